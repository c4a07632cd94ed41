"""One pass over tokens gives what arithmetic over all rows gives, whatever its batches and interruptions."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor

from glp_lens.errors import InputError
from glp_lens.evals.entries import Entry
from glp_lens.features import TABLES, About, FeatureFolder, ModelAbout, passes, sample, tables
from glp_lens.features.accumulate import Moments
from glp_lens.features.passes import measure
from glp_lens.features.sample import Sample
from glp_lens.features.settings import FeatureSettings
from glp_lens.features.source import Batch
from glp_lens.models.denoiser import DenoiserConfig
from glp_lens.models.fitting import initial_denoiser
from glp_lens.models.glp import GLP
from glp_lens.models.random_features import RandomFeatures
from glp_lens.training.config import TrainConfig

D, HOOK = 6, "blocks.1.hook_resid_post"
SETTINGS = FeatureSettings(top=4, per_band=3, window=5, sample=64)


class Killed(BaseException):
    """Stands for the end of a process."""


class Memory:
    """Random texts of 1 to 30 tokens in memory, some twice, in batches of a few texts."""

    def __init__(self, n: int, seed: int = 0, per_batch: int = 7) -> None:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, 31, n)
        keys = rng.integers(1, 1 << 63, n, dtype=np.uint64) * np.uint64(2)  # above 2^63 too
        keys[n // 2] = keys[1]
        lengths[n // 2] = lengths[1]
        self.texts = np.repeat(np.arange(n), lengths)
        self.keys = keys[self.texts]
        self.positions = np.concatenate([np.arange(1, length + 1) for length in lengths])
        gap = (self.texts == 3) & (self.positions > lengths[3] // 2)
        self.positions[gap] += 1  # a token was left out in the middle of a text
        self.rows = torch.from_numpy(rng.standard_t(4, (len(self.texts), D)).astype(np.float32)) + 1
        self.rows[self.texts == n // 2] = self.rows[self.texts == 1]
        self.ids = rng.integers(0, 50, len(self.texts))
        self.per_batch, self.n, self.stop = per_batch, n, 1 << 62
        self.total = len(self.texts)

    def batches(self, place: int, tokens: int) -> Iterator[Batch]:
        for first in range(place, self.n, self.per_batch):
            if first >= self.stop:
                raise Killed
            chosen = np.flatnonzero((self.texts >= first) & (self.texts < first + self.per_batch))
            starts = np.flatnonzero(np.diff(self.texts[chosen], prepend=-1))
            columns = self.keys[chosen], self.positions[chosen], self.ids[chosen]
            yield Batch({HOOK: self.rows[chosen]}, *columns, starts, first + self.per_batch)


class Empty(Memory):
    """No texts."""

    def __init__(self) -> None:
        self.total = 0

    def batches(self, place: int, tokens: int) -> Iterator[Batch]:
        yield from ()


def prior() -> GLP:
    denoiser = initial_denoiser(DenoiserConfig(D, d_model=8, d_mlp=7, n_layers=2), TrainConfig())
    return GLP(denoiser, torch.ones(D), torch.full((D,), 2.0))


def entries() -> list[Entry]:
    random = RandomFeatures.draw(torch.ones(D), torch.ones(D), 9)
    random.weights[4] = 0  # never on
    return [Entry("glp", prior(), {"sigma": 0.2}, HOOK), Entry("random", random, {}, HOOK)]


def all_features(source: Memory, entry: Entry) -> Tensor:
    """Of all rows at once."""
    whole = Sample(source.rows, source.keys, source.positions, source.ids)
    return sample.encode(entry.model, entry.options, whole, seed=5)


@pytest.fixture(scope="module")
def source() -> Memory:
    return Memory(300)


@pytest.fixture(scope="module")
def built(source: Memory, tmp_path_factory: pytest.TempPathFactory) -> FeatureFolder:
    return build(source, tmp_path_factory.mktemp("features"))


def build(source: Memory, folder: Path) -> FeatureFolder:
    measured = measure(entries(), source, SETTINGS, seed=5, folder=folder, key="k")
    models = tables.write(measured, folder, names={"glp": "models/glp"}, decode=lambda i: f"<{i}>", seed=5)
    FeatureFolder(folder).finish(About(models, {}, measured.texts, measured.tokens, "toy", {}, {}))
    return FeatureFolder.open(folder)


@pytest.mark.parametrize("label", ["glp", "random"])
def test_statistics_are_those_of_all_rows(source, built, label):
    x = all_features(source, next(each for each in entries() if each.label == label)).double().numpy()
    table = built.table(label, "features")
    dead = x.min(0) == x.max(0)
    assert dead.sum() == (label == "random")
    np.testing.assert_allclose(table["mean"], x.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(table["std"], x.std(0), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(table["kurtosis"][~dead], stats.kurtosis(x)[~dead], rtol=1e-4, atol=1e-4)
    assert table["kurtosis"][dead].isna().all()
    np.testing.assert_allclose(table["min"], x.min(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(table["max"], x.max(0), rtol=1e-5, atol=1e-7)
    assert table["dead"].tolist() == dead.tolist()
    counts = np.stack(table["histogram"])
    assert (counts.sum(1) == SETTINGS.sample).all()
    if label == "random":  # never negative: every token is counted
        np.testing.assert_allclose(table["density"], (x > 0).mean(0))
    else:  # of the sample, whose error is at most 0.06
        on = (np.abs(x) > 0.1 * np.abs(x).max(0)).mean(0)
        assert np.abs(table["density"] - on).max() < 0.25
    assert table["dense"].tolist() == (table["density"] > 0.1).tolist()


def test_moments_of_features_far_from_zero_and_tiny_ones():
    x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) ** 3 * torch.tensor([1.0, 1e-12, 1.0])
    x += torch.tensor([0.0, 0.0, 300.0])
    moments = Moments(3)
    for part in x.split(170):
        moments.update(part)
        moments.extremes(part)
    mean, std, kurtosis = moments.summary()
    wide = x.double().numpy()
    np.testing.assert_allclose(mean, wide.mean(0), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(std, wide.std(0), rtol=1e-4)
    np.testing.assert_allclose(kurtosis, stats.kurtosis(wide), rtol=1e-3)


@pytest.mark.parametrize(("label", "group"), [("glp", "top"), ("glp", "bottom"), ("random", "top")])
def test_examples_are_the_most_extreme_tokens_of_distinct_texts(source, built, label, group):
    x = all_features(source, next(each for each in entries() if each.label == label)).numpy()
    sign = -1 if group == "bottom" else 1
    table = built.table(label, "examples").query("group == @group")
    peaks = pd.DataFrame(x * sign).groupby(source.keys).max()
    for feature, rows in table.groupby("feature"):
        expected = peaks[feature][peaks[feature] > 0].nlargest(SETTINGS.top)
        np.testing.assert_allclose(rows["value"] * sign, expected, rtol=1e-5)
        assert rows["rank"].tolist() == list(range(len(expected)))
        assert rows["key"].is_unique
        assert set(rows["key"]) <= set(source.keys.tolist())
    assert set(table["feature"]) == {f for f in range(x.shape[1]) if (x[:, f] * sign).max() > 0}


@pytest.mark.parametrize("label", ["glp", "random"])
def test_passages_are_consecutive_tokens_around_the_one_shown(source, built, label):
    x = all_features(source, next(each for each in entries() if each.label == label)).numpy()
    place = {(int(k), int(p)): i for i, (k, p) in enumerate(zip(source.keys, source.positions, strict=True))}
    for row in built.table(label, "examples").itertuples():
        i = place[int(row.key), row.position]
        first = i - row.peak
        index = np.arange(first, first + len(row.values))
        assert (source.keys[index] == source.keys[i]).all()
        assert (source.positions[index] - row.position == index - i).all()
        assert row.token_ids.tolist() == source.ids[index].tolist()
        assert row.tokens.tolist() == [f"<{token}>" for token in row.token_ids]
        np.testing.assert_allclose(row.values, x[index, row.feature], rtol=1e-4, atol=1e-5)
        assert row.values[row.peak] == pytest.approx(row.value)
        further = [(int(row.key), row.position + step) in place for step in (-row.peak - 1, len(row.values) - row.peak)]
        # A window ends where the text does, and where a token was left out.
        assert row.peak == 2 or not further[0]
        assert len(row.values) - row.peak == 3 or not further[1]


@pytest.mark.parametrize("number", [0, 1])
def test_bands_hold_the_rows_of_least_priority(source, tmp_path, number):
    entry = entries()[number]
    bands = measure([entry], source, SETTINGS, seed=5, folder=tmp_path, key="k").tracked[0].bands
    x = all_features(source, entry).numpy()
    level = np.abs(x) / np.abs(x).max(0).clip(1e-30)
    on = (level > 0.1) if entry.label == "glp" else (x > 0)
    priority, group = sample.priorities(source.keys, source.positions, 5), bands.groups()
    have = possible = 0
    for feature, band in np.ndindex(x.shape[1], 5):
        inside = on[:, feature] & (np.minimum(level[:, feature] * 5, 4).astype(int) == band)
        found = bands.priority[feature][group[feature] == band].numpy()
        complete = np.sort(priority[inside & (priority < float(bands.limit[feature, band]))])
        assert np.sort(found)[: len(complete)] == pytest.approx(complete[: SETTINGS.per_band])
        assert np.isin(found, priority[inside]).all()
        have, possible = have + len(found), possible + min(SETTINGS.per_band, inside.sum())
    assert have > 0.9 * possible


def test_an_interrupted_pass_ends_as_one_that_was_not(source, built, tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(passes._Clock, "due", lambda self: True)
    other = Memory(300)
    for stop in (7, 70, 77, 210):  # at several points, the first before anything was saved twice
        other.stop = stop
        with pytest.raises(Killed):
            build(other, tmp_path)
    other.stop = 1 << 62
    resumed = build(other, tmp_path)
    for label in ("glp", "random"):
        for table in ("features", "examples"):
            pd.testing.assert_frame_equal(resumed.table(label, table), built.table(label, table), check_exact=True)
    one, two = (Sample.read(sample.sample_path(folder.path, HOOK)) for folder in (resumed, built))
    assert torch.equal(one.rows, two.rows)
    assert (one.keys == two.keys).all()


def test_a_state_of_other_settings_is_not_gone_on_from(source, built, tmp_path, monkeypatch):
    monkeypatch.setattr(passes._Clock, "due", lambda self: True)
    other = Memory(300, seed=1)
    other.stop = 140
    with pytest.raises(Killed):
        measure(entries(), other, SETTINGS, seed=5, folder=tmp_path, key="of other texts")
    again = build(source, tmp_path)
    pd.testing.assert_frame_equal(again.table("glp", "features"), built.table("glp", "features"))


def test_a_damaged_state_is_refused(source, tmp_path):
    (tmp_path / passes.STATE).write_bytes(b"damaged")
    with pytest.raises(InputError, match="delete it to start afresh"):
        build(source, tmp_path)


def test_batches_change_nothing_but_rounding(source, built, tmp_path):
    other = Memory(300, per_batch=23)
    table, same = build(other, tmp_path).table("glp", "features"), built.table("glp", "features")
    pd.testing.assert_frame_equal(table, same, rtol=1e-4, atol=1e-6)
    one, two = (folder.table("glp", "examples").query("group == 'top'") for folder in (built, FeatureFolder(tmp_path)))
    assert one["key"].tolist() == two["key"].tolist()


def test_what_is_kept_does_not_grow_with_the_texts(tmp_path):
    def kept(n: int) -> int:
        measured = measure(entries(), Memory(n), SETTINGS, seed=5, folder=tmp_path, key="k")
        states = [*(each.state() for each in measured.tracked), measured.rows.state()]
        return sum(tensor.nbytes for state in states for tensor in state.values())

    assert kept(100) == kept(400)


def test_the_sample_is_uniform_and_does_not_depend_on_the_order(source, built):
    found = Sample.read(built.path / f"sample-{HOOK}.safetensors")
    priority = sample.priorities(source.keys, source.positions, 5)
    kept = set(np.unique(priority)[: SETTINGS.sample - 5])
    mine = sample.priorities(found.keys, found.positions, 5)
    assert kept <= set(mine)
    assert (np.diff(mine) >= 0).all()
    assert len(found) == SETTINGS.sample
    place = {(int(k), int(p)): i for i, (k, p) in enumerate(zip(source.keys, source.positions, strict=True))}
    index = [place[int(k), int(p)] for k, p in zip(found.keys, found.positions, strict=True)]
    assert torch.equal(found.rows, source.rows[index])
    assert found.token_ids.tolist() == source.ids[index].tolist()


def test_priorities_are_uniform():
    keys = np.arange(200, dtype=np.uint64).repeat(50)
    priority = sample.priorities(keys, np.tile(np.arange(50), 200), 0)
    assert stats.kstest(priority, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(priority[:-1], priority[1:])[0, 1]) < 0.04


def test_noise_of_a_row_is_the_same_in_any_batch_and_normal():
    keys = np.array([3, 3, 3, 8, 1 << 63], dtype=np.uint64)
    positions = np.array([1, 40, 41, 1, 7])
    whole = sample.noise(keys, positions, 2000, seed=1)
    order = [4, 2, 0]
    assert torch.equal(sample.noise(keys[order], positions[order], 2000, seed=1), whole[order])
    assert not torch.equal(sample.noise(keys, positions, 2000, seed=2), whole)
    assert (torch.corrcoef(whole) - torch.eye(5)).abs().max() < 0.1
    assert stats.kstest(whole.flatten(), "norm").pvalue > 1e-3
    assert sample.noise(keys[:0], positions[:0], 4, seed=1).shape == (0, 4)


def test_a_sample_survives_being_written(tmp_path):
    one = Sample(torch.rand(3, 2), np.array([1, 1 << 63, 7], dtype=np.uint64), np.array([1, 2, 3]), np.array([4, 5, 6]))
    one.write(tmp_path / "sample.safetensors")
    two = Sample.read(tmp_path / "sample.safetensors")
    assert torch.equal(one.rows, two.rows)
    for name in ("keys", "positions", "token_ids"):
        assert (getattr(one, name) == getattr(two, name)).all()


def test_the_sample_of_features_is_that_of_the_pass(source, built):
    about = built.model("glp")
    rows = Sample.read(sample.sample_path(built.path, about.hook))
    found = sample.encode(prior(), sample.options_of(about), rows, seed=5)
    table = built.table("glp", "features")
    assert (found.numpy() <= table["max"].to_numpy() + 1e-5).all()
    place = {(int(k), int(p)): i for i, (k, p) in enumerate(zip(rows.keys, rows.positions, strict=True))}
    top = [row for row in built.table("glp", "examples").itertuples() if (int(row.key), row.position) in place]
    assert len(top) > 10
    for row in top:
        assert found[place[int(row.key), row.position], row.feature] == pytest.approx(row.value, abs=1e-4)


def test_folder_says_what_the_models_are(built):
    glp, random = built.about.models
    assert isinstance(glp, ModelAbout)
    assert (glp.kind, glp.n_features, glp.blocks, glp.signed, glp.sigma, glp.name) == (
        "glp",
        14,
        2,
        True,
        0.2,
        "models/glp",
    )
    assert (random.kind, random.n_features, random.blocks, random.signed, random.sigma) == ("random", 9, 1, False, None)
    assert list(built.table("glp", "features").columns[: len(TABLES["features"])]) == list(TABLES["features"])
    unit = built.table("glp", "features").iloc[9]
    assert (unit["block"], unit["unit"]) == (1, 2)


def test_features_that_are_not_finite_are_refused(source, tmp_path):
    bad = entries()
    assert isinstance(bad[1].model, RandomFeatures)
    bad[1].model.weights[3] = torch.inf
    with pytest.raises(InputError, match="feature 3 of random is not finite"):
        measure(bad, source, SETTINGS, seed=5, folder=tmp_path, key="k")


def test_no_tokens_are_refused(tmp_path):
    with pytest.raises(InputError, match="no token to measure features on"):
        measure(entries(), Empty(), SETTINGS, seed=5, folder=tmp_path, key="k")
