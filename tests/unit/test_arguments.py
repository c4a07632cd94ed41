"""What public functions say of an argument of the wrong kind: one line that names it, before anything is done."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch

import glp_lens as gl
from glp_lens import activations, corpus, directions, hooks, pipeline
from glp_lens.activations import write_store
from glp_lens.arguments import check, checked
from glp_lens.interface import Featurizer

HOOK = "blocks.1.hook_resid_post"
ROWS = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
METHODS = {
    "fit finetune at encode project sample score log_density velocity normalize denormalize from_pretrained "
    "save_pretrained save_released to push_to_hub": gl.GLP,
    "fit encode decode reconstruct project score health from_sae_lens from_pretrained": gl.SAE,
    "fit encode decode reconstruct project sample score": gl.PCA,
    "fit encode normalize denormalize project sample score velocity": gl.Gaussian,
    "fit encode decode sample": gl.Raw,
    "fit draw encode": gl.RandomFeatures,
    "of": gl.Neurons,
    "open rows take column sample sample_index batches centred_norm_quantile": gl.ActivationStore,
    "open": gl.ActivationStream,
    "__init__": gl.StoreDataset,
    "of save load": directions.Direction,
    "of chat": corpus.Document,
}
TAKES_ANYTHING = {"parse_number", "binary_labels"}
"""Functions of values of any kind."""
BY_THEMSELVES = {"collect_again"}
"""Functions that refuse in words of their own."""


class Strange:
    """Of no kind that any function takes."""


def public() -> Iterator[tuple[str, Callable[..., Any], bool]]:
    """Name and function of all that a user calls, and whether it needs an object in front."""
    for package in (gl, hooks, directions, activations, corpus, pipeline):
        for name in package.__all__:
            made = getattr(package, name)
            if isinstance(made, FunctionType) and name not in TAKES_ANYTHING | BY_THEMSELVES:
                yield f"{package.__name__.split('.')[-1]}.{name}", made, False
    for names, cls in METHODS.items():
        for name in names.split():
            yield f"{cls.__name__}.{name}", getattr(cls, name), not inspect.ismethod(getattr(cls, name))


@pytest.mark.parametrize(("function", "needs_object"), [pytest.param(f, m, id=name) for name, f, m in public()])
def test_an_argument_of_the_wrong_kind_is_named(function, needs_object):
    parameters = [p for name, p in inspect.signature(function).parameters.items() if name not in ("self", "cls")]
    named = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if function.__module__.startswith("glp_lens.pipeline"):
        named = [name for name in named if name in ("settings", "job")]  # other types are imported when needed
    for name in named:
        with pytest.raises(gl.InputError, match=f"^{name} must be .*, got a Strange"):
            function(*[None] * needs_object, **{name: Strange()})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of one hook point, and models of it."""
    store = write_store(tmp_path_factory.mktemp("store") / "acts", ROWS, hook=HOOK)
    glp = gl.GLP.fit(store, gl.recipe("fast", rows=128, batch_size=32), d_model=8, d_mlp=16, n_layers=1)
    vector = directions.Direction.of(ROWS[0], HOOK, name="cats", method="mean")
    return {"store": store, "glp": glp, "pca": gl.PCA.fit(store), "direction": vector}


MISTAKES = {
    "a store by its path": (lambda m: gl.PCA.fit(m["store"].path), "store must be an ActivationStore.*: open it with"),
    "rows for a store": (lambda m: gl.PCA.fit(ROWS), r"got a Tensor: gl.activations.write_store\(folder, rows"),
    "all stores of a collection": (lambda m: gl.PCA.fit({HOOK: m["store"]}), "a dict: .*pass one of them"),
    "a path for a GLP's store": (lambda m: gl.GLP.fit("acts"), "'acts': open it with gl.ActivationStore.open"),
    "a projector by its path": (lambda m: hooks.project("paper"), "projector must be .*'paper': open it with gl.load"),
    "to repair by a path": (lambda m: hooks.steer(ROWS[0], 1.0, projector="paper"), "open it with gl.load"),
    "a model that cannot project": (lambda m: hooks.project(gl.RandomFeatures.fit(m["store"])), "got a RandomFeatures"),
    "a GLP for an SAE": (lambda m: directions.sae_latent(m["glp"], 0), "sae must be an SAE, got a GLP"),
    "clamping a GLP": (lambda m: directions.clamp_latents(m["glp"], {0: 1.0}), "sae must be an SAE, got a GLP"),
    "a GLP as one of sae-lens": (lambda m: gl.SAE(m["glp"]), "sae must be a sae_lens.SAE, got a GLP"),
    "a PCA for a GLP": (lambda m: directions.class_means(m["pca"], 1.0), "glp must be a GLP, got a PCA"),
    "a Direction for its vector": (lambda m: hooks.steer(m["direction"], 1.0), "got a Direction: pass its .vector"),
    "a strength as text": (lambda m: hooks.steer(ROWS[0], "2"), "strength must be a number, .*, got '2'"),
    "rows of NumPy": (lambda m: m["glp"].encode(ROWS.numpy()), r"torch.Tensor \(n, d_in\), got .* ndarray: torch.as_"),
    "noise as a list": (lambda m: m["pca"].sample(2, noise=[0.0]), "noise must be a torch.Tensor"),
    "a device for a generator": (lambda m: m["glp"].sample(2, generator="cpu"), "must be a Generator or None"),
    "the released code's u": (lambda m: m["glp"].encode(ROWS, u=0.9), "takes no 'u': the noise level is sigma"),
    "the time as t": (lambda m: m["glp"].velocity(ROWS, 0.1, t=0.5), "takes no 't': the noise level is sigma"),
    "an option unknown": (lambda m: m["glp"].project(ROWS, sigmas=0.5), "GLP.project takes no 'sigmas': it takes x, u"),
    "an option of a repair": (lambda m: hooks.project(m["glp"], t=0.5), "takes no 't': the noise level is sigma"),
    "another model's option": (lambda m: m["pca"].projection_hook(sigma=0.5), "PCA.project takes no 'sigma'"),
    "an option of a wrong kind": (lambda m: hooks.project(m["glp"], steps="20"), "steps must be a whole number"),
    "an LM by its name": (lambda m: gl.collect("gpt2", ["a"]), "model, got 'gpt2': open it with gl.open_model"),
    "one text for texts": (lambda m: corpus.split_documents("text"), "got 'text': pass a list, also of one"),
    "missing values for texts": (
        lambda m: corpus.split_documents(["a", float("nan")]), "texts must be .*got a list with nan"),
    "a method unknown": (lambda m: directions.estimate(ROWS, ROWS, "median"), "one of mean, probe, pca, got 'median'"),
    "true for a number": (lambda m: gl.Raw.fit(m["store"], n_rows=True), "n_rows must be a whole number, got True"),
    "text for a switch": (lambda m: m["glp"].sample(2, fast="no"), "fast must be true or false, got 'no'"),
    "no settings": (lambda m: pipeline.train("models"), "settings must be a TrainJob, got 'models'"),
    "rows of two widths": (lambda m: directions.from_rows(ROWS, ROWS[:, :4], HOOK), "one width"),
    "a row for rows": (lambda m: directions.from_rows(ROWS[0], ROWS[1], HOOK), r"rows of shape \(n, d\)"),
    "a vector of another width": (lambda m: directions.separation(ROWS[0, :4], ROWS[:9], ROWS[9:]), "one width"),
    "rows of heads": (lambda m: directions.random_covariance(ROWS[None], hook=HOOK), r"rows of shape \(n, d\)"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_newcomers_do_is_told_in_one_line(mistake, made):
    do, said = MISTAKES[mistake]
    with pytest.raises(gl.InputError, match=said) as raised:
        do(made)
    assert "\n" not in str(raised.value)


FITS = [
    (int, [3, np.int64(3), torch.tensor(3)], [3.5, "3", True, None]),
    (float, [0.5, 3, np.float32(0.5), torch.tensor(0.5)], ["0.5", True, torch.ones(2)]),
    (bool, [True, np.bool_(True)], [1, "yes"]),
    (str | Path, ["acts", Path("acts")], [3, ["acts"]]),
    (Sequence[str], [["a"], ("a",), pd.Series(["a"]), np.array(["a"]), []], ["a", [1], {"a": 1}, {"a"}, ["a", None]]),
    (Mapping[int, float], [{1: 2.0}, {}], [{"1": 2.0}, {1: "2"}, [1]]),
    (tuple[int, int], [(0, 2), [0, 2]], [(0,), (0, "2"), 2]),
    (Literal["a", 1] | None, ["a", 1, None], ["b", True, 2]),
    (Callable[[int], int], [len], ["len"]),
    (Any, [Strange()], []),
    (np.typing.ArrayLike, [[1.0], np.ones(3), 2.0], []),
]


@pytest.mark.parametrize(("hint", "right", "wrong"), FITS, ids=lambda each: str(each)[:30])
def test_which_values_an_annotation_takes(hint, right, wrong):
    def function(value):
        return value

    function.__annotations__["value"] = hint
    for value in right:
        assert checked(function)(value) is value
    for value in wrong:
        with pytest.raises(gl.InputError, match="^value must be "):
            checked(function)(value)


def test_texts_that_come_one_by_one_are_left_for_their_reader():
    texts = iter(["a", "b"])
    check(corpus.split_documents, texts)
    assert list(texts) == ["a", "b"]


def test_models_of_other_authors_are_checked_by_their_own_annotations():
    class Mine(Featurizer):
        n_features = 1

        def encode(self, x: torch.Tensor, *, noise=None, generator=None):
            return x

    assert Mine().encode(ROWS, noise="any") is ROWS
    with pytest.raises(gl.InputError, match="x must be a torch.Tensor, got 'rows'"):
        Mine().encode("rows")


def test_a_prior_of_one_layer_knows_no_other(made):
    glp = made["glp"]
    for own in (1, HOOK, "blocks.1.hook_out"):
        assert glp.at(own) is glp
    for other in (7, "blocks.7.hook_resid_post"):
        with pytest.raises(gl.InputError, match=rf"trained at {HOOK} alone, got {other}"):
            glp.at(other)
    assert glp.projection_hook("blocks.7.hook_resid_post", allow_mismatch=True)[0] == "blocks.7.hook_resid_post"
    unknown = gl.GLP(glp.denoiser, glp.mean, glp.var)
    assert unknown.at(7) is unknown


def test_directions_and_statistics_are_shown_without_their_numbers(made):
    assert repr(made["direction"]).startswith(f"Direction(hook='{HOOK}', name='cats', method='mean', ")
    assert len(repr(made["direction"])) < 150
    assert repr(made["store"].stats).startswith("Stats(count=60, norm_sum=")
