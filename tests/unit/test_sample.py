"""`glp-lens sample`: the rows of the library, in a file that numpy and safetensors read."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import glp_lens as gl
from glp_lens.activations import convert, write_store
from glp_lens.errors import InputError
from glp_lens.models.random_features import RandomFeatures
from glp_lens.pipeline import SampleJob, sample
from glp_lens.training.config import TrainConfig

D, HOOK = 6, "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    x = torch.randn(300, D, generator=torch.Generator().manual_seed(0)) * 3 + 5
    columns = {"topic": np.arange(300, dtype=np.float32) % 2}
    store = write_store(root / "store", x, hook=HOOK, columns=columns, labels={"topic": "float32"})
    config = TrainConfig(batch_size=32, rows=96)
    size = {"d_model": 8, "d_mlp": 10, "n_layers": 2}
    gl.GLP.fit(store, config, **size).save_pretrained(root / "glp")
    gl.GLP.fit(store, config, **size, condition="topic").save_pretrained(root / "classes")
    gl.PCA.fit(store).save_pretrained(root / "pca")
    gl.Gaussian.fit(store).save_pretrained(root / "gaussian")
    RandomFeatures.fit(store).save_pretrained(root / "random")
    return root


def quietly(**settings):
    return sample(SampleJob(**settings), say=lambda _: None)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("glp", {}), ("glp", {"fast": True}), ("glp", {"solver": "heun", "steps": 3, "grid": "even"}), ("gaussian", {}),
     ("pca", {})],
)  # fmt: skip
def test_the_file_holds_the_rows_that_the_model_draws(folder, tmp_path, kind, options):
    rows = quietly(folder=str(folder / kind), n=17, seed=3, out=tmp_path / "rows.npy", **options)
    expected = gl.load(folder / kind).sample(17, generator=seeded(3), **options)
    assert torch.equal(rows, expected)
    assert np.array_equal(np.load(tmp_path / "rows.npy", allow_pickle=False), expected.numpy())


def test_safetensors_say_where_rows_are_from_and_become_a_store(folder, tmp_path):
    path = tmp_path / "rows.safetensors"
    rows = quietly(folder=str(folder / "pca"), n=9, out=path)
    assert torch.equal(load_file(path)["activations"], rows)
    with safe_open(path, "pt") as file:
        assert file.metadata().items() >= {"model": "pca", "hook": HOOK, "seed": "0"}.items()
    assert torch.equal(convert.import_arrays([path], tmp_path / "store", hook=HOOK).rows(), rows)


def test_rows_of_a_class(folder, tmp_path):
    settings = {"folder": str(folder / "classes"), "n": 5, "steps": 4}
    rows = quietly(**settings, class_label=1, guidance=2.0, out=tmp_path / "a.npy")
    prior = gl.load(folder / "classes")
    expected = prior.sample(5, generator=seeded(0), steps=4, condition=prior.class_vectors[1.0], guidance=2.0)
    assert torch.equal(rows, expected)
    assert not torch.equal(rows, quietly(**settings, class_label=0, guidance=2.0, out=tmp_path / "b.npy"))
    with pytest.raises(InputError, match="knows no class 7: it knows 0, 1"):
        quietly(**settings, class_label=7, out=tmp_path / "c.npy")


def test_what_cannot_sample_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="is of kind random, which cannot sample"):
        quietly(folder=str(folder / "random"), out=tmp_path / "rows.npy")
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_only_if_asked(folder, tmp_path):
    settings = {"folder": str(folder / "pca"), "n": 2, "out": tmp_path / "rows.npy"}
    quietly(**settings)
    with pytest.raises(InputError, match="pass --overwrite"):
        quietly(**settings)
    quietly(**settings | {"n": 3}, overwrite=True)
    assert np.load(tmp_path / "rows.npy").shape == (3, D)
