"""`glp-lens direction` and `glp-lens generate` on tiny models."""

import pandas as pd
import pytest
import torch

from glp_lens import lm
from glp_lens.activations import write_store
from glp_lens.directions import Direction
from glp_lens.models.gaussian import Gaussian
from glp_lens.pipeline import DirectionJob, GenerateJob, direction, generate
from tests.conftest import tiny_texts

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def folder(tmp_path, tiny_model):
    x = 3 * torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    store = write_store(tmp_path / "acts", x, hook=HOOK)
    Gaussian.fit(store).save_pretrained(tmp_path / "gaussian")
    towards = torch.randn(24, generator=torch.Generator().manual_seed(1))
    Direction.of(towards, HOOK, name="somewhere", method="test").save(tmp_path / "there.safetensors")
    (tmp_path / "prompts.txt").write_text("the cat, of\n\nit is\n")
    return tmp_path


def go(folder, model, **options):
    said = []
    options = {"direction": folder / "there.safetensors", "store": folder / "acts", "prompt": "the cat", **options}
    rows = generate(GenerateJob(strength=(0.5, 3.0), new_tokens=6, **options), model=model, say=said.append)
    return pd.DataFrame(rows), "\n".join(said)


def test_methods_stand_side_by_side(folder, tiny_model):
    frame, said = go(
        folder, tiny_model, prompts_file=folder / "prompts.txt", prior=(f"prior={folder / 'gaussian'}",),
        allow_mismatch=True, out=folder / "texts.csv",
    )  # fmt: skip
    assert list(dict.fromkeys(frame.method)) == ["unsteered", "plain", "prior", "prior difference"]
    assert set(frame.prompt) == {"the cat, of", "it is"}
    assert len(frame) == 2 * (1 + 3 * 2)
    assert all(" ".join(text.split()) in " ".join(said.split()) for text in frame.text)
    pd.testing.assert_frame_equal(pd.read_csv(folder / "texts.csv", keep_default_na=False), frame)


def test_no_steering_is_what_the_model_writes_by_itself(folder, tiny_model):
    frame, _ = go(folder, tiny_model)
    tokens = torch.tensor(lm.to_ids(tiny_model, ["the cat"], 64))
    text = lm.decode(tiny_model, lm.generate(tiny_model, tokens, 6)[0, tokens.shape[1] :].tolist())
    assert frame.text[frame.method == "unsteered"].tolist() == [text]


def test_sampling_repeats_with_its_seed(folder, tiny_model):
    one, again, other = (go(folder, tiny_model, temperature=2.0, seed=seed)[0].text.tolist() for seed in (0, 0, 1))
    assert one == again != other


def test_a_direction_of_texts_goes_through_its_file(folder, tiny_model):
    texts = tiny_texts(40)
    (folder / "for.txt").write_text("\n".join(f"{text} goal" for text in texts[:20]))
    (folder / "against.txt").write_text("\n".join(f"{text} bank" for text in texts[20:]))
    settings = DirectionJob(
        positive_texts=folder / "for.txt", negative_texts=folder / "against.txt", hook=HOOK,
        out=folder / "goal.safetensors",
    )  # fmt: skip
    made = direction(settings, model=tiny_model, say=lambda _: None)
    assert torch.equal(Direction.load(folder / "goal.safetensors").vector, made.vector)
    frame, _ = go(folder, tiny_model, direction=folder / "goal.safetensors")
    assert set(frame.method) == {"unsteered", "plain"}
