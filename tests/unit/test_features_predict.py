"""The rule that predicts where features are active, its intervals, and the numbers of a planted folder."""

from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from glp_lens import lm
from glp_lens.artifacts import ActivationModel
from glp_lens.corpus import Document
from glp_lens.errors import InputError
from glp_lens.features import About, FeatureFolder, ModelAbout, labels, passages, predict
from glp_lens.features.passages import Passages, Watched
from glp_lens.features.sample import Sample, noise, sample_path
from glp_lens.interface import Featurizer
from glp_lens.intervals import auc_interval
from tests.conftest import tiny_texts

HOOK = "blocks.1.hook_resid_post"
FEATURES, TOKENS, LENGTH = 24, 60, 5
WORDS = ModelAbout("words", "words", "sae", HOOK, FEATURES, 1, False)
NOISE = ModelAbout("noise", "noise", "pca", HOOK, FEATURES, 1, True)


def folder_of(path, rng):
    """Two models: feature f of `words` is on at token f, what `noise` is on at is random."""
    folder = FeatureFolder(path)
    folder.finish(About((WORDS, NOISE), {}, 40, 400, "", {}, {}))
    for model in (WORDS, NOISE):
        high = np.ones(FEATURES)
        low = -2 * high if model.signed else 0 * high
        dead, dense = np.arange(FEATURES) == 0, np.arange(FEATURES) < 6
        table = dict.fromkeys(("mean", "std", "kurtosis", "density", "histogram_low", "histogram_high"), high)
        table |= {"feature": np.arange(FEATURES), "block": 0, "unit": np.arange(FEATURES), "min": low, "max": high,
                  "dead": dead, "dense": dense, "histogram": [[1]] * FEATURES}  # fmt: skip
        folder.write_table(model, "features", pd.DataFrame(table))
        rows = []
        for feature in range(1, FEATURES):
            for group in ("top", "bottom") if model.signed else ("top",):
                for rank in range(8):
                    ids = rng.integers(30, TOKENS, LENGTH)
                    ids[2] = feature if model is WORDS else ids[2]
                    rows.append((feature, group, rank, rank, 3, 2, 1.0, ids.tolist(), [str(i) for i in ids], [1.0] * 5))
        columns = ["feature", "group", "rank", "key", "position", "peak", "value", "token_ids", "tokens", "values"]
        folder.write_table(model, "examples", pd.DataFrame(rows, columns=columns))
    ids = np.arange(3000) % TOKENS
    ones = np.ones(3000, np.int64)
    Sample(torch.zeros(3000, 2), ones.astype(np.uint64), ones, ids).write(sample_path(path, HOOK))
    return folder


def passages_of(rng, n=300):
    ids = rng.integers(0, TOKENS, (n, LENGTH))
    words = np.stack([(ids == f).any(1) for f in range(1, FEATURES)], 1).astype(np.float32)
    noise = rng.normal(size=(2, n, FEATURES - 1)).astype(np.float32)
    return Passages(np.arange(n) // 3, list(ids), {"words": words[None], "noise": noise})


def watched_of(folder, label):
    return Watched.of(folder, label, None, np.arange(1, FEATURES))


def test_labels_predict_what_they_name_and_nothing_of_noise(tmp_path):
    rng = np.random.default_rng(0)
    folder = folder_of(tmp_path, rng)
    drawn, notes = predict.draw(folder, ["words", "noise"], 0, 0)
    assert notes == []
    assert {among: {label: len(f) for label, f in own.items()} for among, own in drawn.items()} == {
        "alive": {"words": 23, "noise": 23}, "sparse": {"words": 18, "noise": 18}
    }  # fmt: skip
    watched = {label: watched_of(folder, label) for label in ("words", "noise")}
    results, table = predict.measure(folder, passages_of(rng), watched, drawn, seed=0)
    found = {(m.model, m.setting.get("among"), m.setting.get("active"), m.name): m for m in results.metrics}
    for among in ("alive", "sparse"):
        assert found["words", among, "tenth", "auc"].value > 0.95
        assert found["words", among, "on", "auc"].value > 0.95
        assert found["words", among, None, "label_overlap"].value > 0.7
        assert found["words", among, None, "label_overlap_exchanged"].value < 0.1
        assert found["words", among, None, "seed_correlation"].value == pytest.approx(1)
        assert found["noise", among, None, "seed_correlation"].value == pytest.approx(0, abs=0.1)
        for key in (("noise", among, "tenth", "auc"), ("words", among, "tenth", "auc_exchanged")):
            assert found[key].ci_low < 0.5 < found[key].ci_high
        gain = found["words", among, "tenth", "auc_diff:noise"]
        assert gain.ci_low > 0.3
        assert (gain.value, gain.ci_low) == pytest.approx(
            tuple(-x for x in (found["noise", among, "tenth", "auc_diff:words"].value,
                               found["noise", among, "tenth", "auc_diff:words"].ci_high)))  # fmt: skip
    assert found["words", "sparse", "tenth", "auc"].n == 100
    assert len(table) == 2 * 2 * 23
    assert table.query("model == 'words'")["auc"].mean() > 0.95


def test_a_model_with_too_few_features_is_left_out_by_name(tmp_path):
    folder = folder_of(tmp_path, np.random.default_rng(0))
    known = folder.table("noise", "features")
    folder.write_table(NOISE, "features", known.assign(dense=np.arange(FEATURES) < 20))
    drawn, notes = predict.draw(folder, ["words", "noise"], 12, 3)
    assert {label: len(f) for label, f in drawn["sparse"].items()} == {"words": 12}
    assert {label: len(f) for label, f in drawn["alive"].items()} == {"words": 12, "noise": 12}
    assert notes == ["noise: 4 sparse features, fewer than 10: left out among sparse"]
    assert all((np.diff(f) > 0).all() and 0 not in f for own in drawn.values() for f in own.values())


def test_the_rule_adds_the_log_odds_of_each_token_once():
    one = labels.Distinctive(np.array([4, 4, 9]), np.array([10, 11, 10]), np.array([2.0, 1.0, 5.0]))
    two = labels.Distinctive(np.array([4]), np.array([10]), np.array([0.5]))
    scores = predict.rule([one, two], np.array([4, 7, 9]), [np.array([10, 10, 11]), np.array([11, 3]), np.array([40])])
    assert scores.tolist() == [[3.5, 0, 5], [1, 0, 0], [0, 0, 0]]


def test_aucs_and_intervals_of_one_feature_are_the_known_ones():
    rng = np.random.default_rng(2)
    document = np.repeat(np.arange(40), 3)
    active = rng.random((120, 2)) < 0.3
    scores = np.round(rng.normal(size=(120, 2)) + active, 1)
    found = predict.aucs(scores, active, document)
    for j in range(2):
        assert found.auc[j] == pytest.approx(roc_auc_score(active[:, j], scores[:, j]))
        known = auc_interval(scores[:, j], active[:, j], document)
        # Half the width of an interval on the logit scale, by its derivative.
        error = np.sqrt(40 / 39 * np.square(found.influence[:, j]).sum())
        value = known.value
        logit = [np.log(x / (1 - x)) for x in (known.ci_low, known.ci_high)]
        assert 1.96 * error == pytest.approx((logit[1] - logit[0]) / 2 * value * (1 - value), rel=0.05)


def test_too_few_active_passages_give_no_auc():
    active = np.zeros((50, 3), dtype=bool)
    active[:4, 0] = active[:, 1] = active[:5, 2] = True
    found = predict.aucs(np.random.default_rng(0).normal(size=(50, 3)), active, np.arange(50))
    assert np.isfinite(found.auc).tolist() == [False, False, True]
    assert found.of(np.arange(3)).auc.shape == (1,)
    assert np.isnan(predict.mean(found.of(np.arange(3))).value)


def test_intervals_of_the_mean_hold_the_truth_over_features_and_texts():
    """Features whose AUCs differ, in texts whose passages are alike: 95% intervals, that err on the wide side."""
    rng, held = np.random.default_rng(5), 0
    shift = 0.8
    truth = norm.cdf(shift / np.sqrt(2 * (1 + 0.3**2) + 0.5**2))  # of normal scores in either class, over features
    for _ in range(200):
        document = np.repeat(np.arange(30), 4)
        lean = shift + 0.5 * rng.normal(size=12)
        active = (rng.random(30) < 0.4)[document][:, None] ^ (rng.random((120, 12)) < 0.2)
        scores = rng.normal(size=(120, 12)) + active * lean + 0.3 * rng.normal(size=30)[document][:, None]
        found = predict.mean(predict.aucs(scores, active, document))
        held += found.ci_low <= truth <= found.ci_high
    assert held >= 180


def test_active_is_a_tenth_at_most_or_what_is_on():
    peaks = np.zeros((40, 3), dtype=np.float32)
    peaks[:, 0] = np.arange(40)
    peaks[:2, 1] = 1
    assert passages.active(peaks, np.array([36, 0, 0], np.float32), "tenth").sum(0).tolist() == [3, 2, 0]
    assert passages.active(peaks, np.array([36, 0.5, 0], np.float32), "on").sum(0).tolist() == [3, 2, 0]


def test_features_are_read_by_the_end_that_reaches_further(tmp_path):
    folder = folder_of(tmp_path, np.random.default_rng(0))
    for label, sign, on in (("words", 1, 0), ("noise", -1, 0.2)):
        watched = watched_of(folder, label)
        assert (watched.sign == sign).all()
        assert watched.on == pytest.approx(on)
    examples = folder.table("noise", "examples")
    chosen = passages.of_end(examples, np.array([3, 5]), np.array([1, -1], np.float32))
    groups = chosen.groupby("feature")["group"].unique()
    assert (groups[3].tolist(), groups[5].tolist()) == (["top"], ["bottom"])


class Counted(ActivationModel, Featurizer):
    """Features that are projections of a row, with the first one of its noise added to all."""

    kind: ClassVar[str] = "counted"
    stochastic = True
    max_norm = None

    def __init__(self, weights, limit=None):
        self.weights, self.max_norm, self.provenance, self.d_in = weights, limit, {}, len(weights)

    @property
    def n_features(self):
        return self.weights.shape[1]

    def encode(self, x, *, noise=None, generator=None):
        return x @ self.weights + noise[:, :1]

    def _config(self):
        return {}

    def _tensors(self):
        return {}

    @classmethod
    def _restore(cls, config, tensors):
        return cls(torch.zeros(1, 1))


def test_peaks_are_the_largest_values_of_whole_passages(tiny_model):
    texts = tiny_texts(9)
    weights = torch.randn(24, 7, generator=torch.Generator().manual_seed(3))
    about = ModelAbout("counted", "counted", "counted", HOOK, 7, 1, True)
    chosen, sign = np.array([1, 4, 6]), np.array([1, -1, 1], np.float32)
    watched = {"counted": Watched(about, Counted(weights), chosen, sign, np.zeros(3, np.float32))}
    documents = [Document.of(text) for text in texts]
    found = passages.read(tiny_model, documents, watched, context=24, length=6, seeds=(5, 6))
    expected, owners = [], []
    for i, document in enumerate(documents):
        [ids] = lm.to_ids(tiny_model, [document.text], 24)
        _, cache = tiny_model.run_with_cache(torch.tensor([ids]))
        rows = cache[HOOK][0].float()
        for start in range(1, len(ids) - 5, 6):
            at = np.arange(start, start + 6)
            both = []
            for seed in (5, 6):
                eps = noise(np.full(6, document.id, np.uint64), at, 24, seed)
                both.append(((rows[at] @ weights + eps[:, :1])[:, chosen] * torch.from_numpy(sign)).amax(0).detach())
            expected.append(torch.stack(both))
            owners.append(i)
            assert found.token_ids[len(owners) - 1].tolist() == ids[start : start + 6]
    assert found.document.tolist() == owners
    assert len(found) == len(owners) > 15
    assert torch.from_numpy(found.peaks["counted"]) == pytest.approx(torch.stack(expected, 1), abs=1e-4)


def test_massive_rows_are_in_no_peak_and_short_texts_are_no_passages(tiny_bridge):
    documents = [Document.of(text) for text in tiny_texts(6)]
    about = ModelAbout("counted", "counted", "counted", HOOK, 2, 1, True)
    ones = np.ones(2, np.float32)
    watched = {"counted": Watched(about, Counted(torch.zeros(24, 2), limit=0.0), np.arange(2), ones, ones)}
    found = passages.read(tiny_bridge, documents, watched, context=24, length=4, seeds=(0,))
    assert np.isneginf(found.peaks["counted"]).all()
    with pytest.raises(InputError, match="no text has 23 tokens"):
        passages.read(tiny_bridge, [Document.of("the cat sat")], watched, context=24, length=23, seeds=(0,))
