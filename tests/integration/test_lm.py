"""Both TransformerLens classes run alike, and alike to the Hugging Face model they were opened from."""

import inspect

import pytest
import torch

from glp_lens import lm
from glp_lens.errors import InputError
from glp_lens.pipeline.inputs import LanguageModelSettings
from glp_lens.settings import options
from tests.conftest import tiny_texts

HOOK = "blocks.1.hook_resid_post"


def test_activations_of_padded_rows_equal_those_of_each_row_alone(tiny_model):
    rows = lm.to_ids(tiny_model, tiny_texts(5), 32)
    tokens, mask = lm.pad(rows)
    together = lm.activations(tiny_model, tokens, mask, [HOOK])[HOOK]
    for i, row in enumerate(rows):
        one = torch.tensor([row])
        alone = lm.activations(tiny_model, one, torch.ones_like(one, dtype=torch.bool), [HOOK])[HOOK]
        torch.testing.assert_close(together[i, : len(row)], alone[0], rtol=1e-4, atol=1e-4)


def test_activations_and_loss_equal_the_hugging_face_model(tiny_model, tiny_folder):
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    tokens, mask = lm.pad(lm.to_ids(tiny_model, tiny_texts(3), 20))
    with torch.no_grad():
        want = hf(tokens, attention_mask=mask.long(), output_hidden_states=True)
    got = lm.activations(tiny_model, tokens, mask, [HOOK])[HOOK]
    torch.testing.assert_close(got[mask], want.hidden_states[2][mask], rtol=1e-4, atol=1e-4)
    log_p = want.logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(lm.token_nll(tiny_model, tokens, mask), -log_p * mask[:, 1:], rtol=1e-4, atol=1e-4)


def test_wanted_losses_are_those_of_all_and_hooks_at_the_unembedding_see_every_position(tiny_model):
    tokens, mask = lm.pad(lm.to_ids(tiny_model, tiny_texts(4), 20))
    every = lm.token_nll(tiny_model, tokens, mask)
    wanted = torch.rand(every.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    some = lm.token_nll(tiny_model, tokens, mask, wanted=wanted)
    torch.testing.assert_close(some, every * wanted, rtol=1e-5, atol=1e-5)
    assert not lm.token_nll(tiny_model, tokens, mask, wanted=torch.zeros_like(wanted)).any()
    seen = []
    watch = ("unembed.hook_in", lambda x, *, hook: seen.append(x.shape[:2]) or x)
    if "unembed.hook_in" in tiny_model.hook_dict:
        torch.testing.assert_close(lm.token_nll(tiny_model, tokens, mask, [watch]), every, rtol=1e-5, atol=1e-5)
        assert seen == [tokens.shape]


def test_every_text_gets_one_bos_and_the_side_asked_for_is_cut(tiny_bridge):
    right = lm.to_ids(tiny_bridge, ["cat dog bird fish"], 3)[0]
    left = lm.to_ids(tiny_bridge, ["cat dog bird fish"], 3, truncate="left")[0]
    ids = tiny_bridge.tokenizer("cat dog bird fish", add_special_tokens=False)["input_ids"]
    bos = tiny_bridge.tokenizer.bos_token_id
    assert right == [bos, *ids[:2]]
    assert left == [bos, *ids[-2:]]
    assert lm.to_ids(tiny_bridge, ["cat dog bird fish"], 99)[0].count(bos) == 1


def test_models_are_described_as_raw_and_processing_is_seen(tiny_folder, tiny_model):
    from transformer_lens import HookedTransformer

    about = lm.describe(tiny_model)
    assert about["weight_processing"] == "raw"
    assert (about["n_layers"], about["d_model"], about["class"]) == (4, 24, type(tiny_model).__name__)
    hooked = lm.open_model(str(tiny_folder), backend="hooked", dtype="float32")
    assert isinstance(hooked, HookedTransformer)
    hooked.process_weights_(fold_ln=True, center_writing_weights=True)
    assert lm.weight_processing(hooked) in ("folded", "folded+centred")


def test_a_wrong_hook_name_suggests_the_near_one(tiny_model):
    assert lm.check_hook(tiny_model, HOOK) == HOOK
    with pytest.raises(InputError, match="did you mean 'blocks.1.hook_resid_post'"):
        lm.check_hook(tiny_model, "blocks.1.hook_resid_pots")
    assert lm.default_hook(tiny_model) == HOOK


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "no/such-model"}, "local folder"),
        ({"name": "./nowhere"}, "does not exist"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
        ({"backend": "jax"}, "backend must be"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, words):
    with pytest.raises(InputError, match=words) as caught:
        lm.open_model(**{"name": "no/such-model", **arguments})
    assert "\n" not in str(caught.value)


def test_the_library_and_the_commands_open_a_model_alike(tiny_folder):
    about = lm.describe(lm.open_model(str(tiny_folder)))
    assert (about["class"], about["dtype"]) == ("TransformerBridge", "bfloat16")
    known = {option.name: option.default for option in options(LanguageModelSettings)}
    for name, parameter in inspect.signature(lm.open_model).parameters.items():
        assert known.get({"name": "model", "dtype": "lm_dtype"}.get(name, name), parameter.default) == parameter.default
