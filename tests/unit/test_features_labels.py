"""Automatic labels: log-odds against posterior draws, and what stands out in planted examples."""

import numpy as np
import pandas as pd
import pytest
import torch

from glp_lens.errors import InputError
from glp_lens.features import labels
from glp_lens.features.sample import Sample, sample_path
from tests.unit.feature_folder import DEAD, GLP, SAE, write_features


def test_log_odds_and_errors_are_those_of_the_posterior():
    """The formulas against draws from the two Dirichlet posteriors that they stand for."""
    counts, background = np.array([30.0, 8.0, 22.0]), np.array([400.0, 500.0, 900.0])
    total, whole = counts.sum(), background.sum()
    odds, error = labels.log_odds(counts, np.full(3, total), background, whole)
    rng = np.random.default_rng(0)
    here = rng.dirichlet(counts + total * background / whole, 200_000)
    there = rng.dirichlet(background, 200_000)
    drawn = np.log(here / (1 - here)) - np.log(there / (1 - there))
    assert odds == pytest.approx(drawn.mean(0), abs=0.02)
    # The error of Monroe et al. leaves out the variance of all other tokens together, which is small for rare tokens.
    assert (error < drawn.std(0)).all()
    assert error == pytest.approx(drawn.std(0), rel=0.4)
    rare = labels.log_odds(np.array([30.0]), np.array([3000.0]), np.array([40.0]), 90_000)
    few = np.array([30.0, 2970.0]) + 3000 * np.array([40, 89_960]) / 90_000
    here, there = rng.dirichlet(few, 200_000)[:, 0], rng.dirichlet([40, 89_960], 200_000)[:, 0]
    drawn = np.log(here / (1 - here)) - np.log(there / (1 - there))
    assert (rare[0][0], rare[1][0]) == pytest.approx((drawn.mean(), drawn.std()), rel=0.03)


def examples_of(windows, peak, *, feature=3, group="top"):
    """Rows of the table of examples; a token's text is its id, with a space in front."""
    return pd.DataFrame(
        [
            (feature, group, rank, rank, peak + 1, peak, 1.0, ids, [f" {i}" for i in ids], [1.0] * len(ids))
            for rank, ids in enumerate(windows)
        ],
        columns=["feature", "group", "rank", "key", "position", "peak", "value", "token_ids", "tokens", "values"],
    )


SAMPLE = np.concatenate([np.repeat([1, 2, 3], 300), np.arange(10, 110)])
"""Three common tokens, and a hundred that occur once."""


def test_a_label_names_what_the_peaks_and_the_tokens_around_them_share():
    windows = [[1, 2, 70, 50, 1], [3, 60, 2, 50, 2], [60, 1, 3, 50, 3], [2, 1, 60, 50, 61], [1, 1, 1, 51, 2]]
    row = labels.table(examples_of(windows, 3), SAMPLE).iloc[0]
    assert (row["feature"], row["label"]) == (3, "50; near 60")
    assert (row["tokens"], row["context"]) == ([" 50"], [" 60"])
    background = 1.5 / (len(SAMPLE) + 0.5 * len(np.unique(SAMPLE)))  # half a count for each kind of token
    share = (4 + 5 * background) / 10  # as many tokens of the prior as there are peaks
    expected = np.log(share / (1 - share)) - np.log(background / (1 - background))
    assert row["log_odds"] == pytest.approx([expected])


def test_a_token_counts_once_in_an_example_and_is_seen_in_two_at_least():
    windows = [[60, 60, 60, 60, 50], [1, 2, 3, 1, 50], [2, 3, 3, 2, 50]]
    row = labels.table(examples_of(windows, 4), SAMPLE).iloc[0]
    assert row["tokens"] == [" 50"]
    assert row["context"] == []


def test_common_tokens_do_not_stand_out_and_a_label_may_be_empty():
    rng = np.random.default_rng(1)
    frames = [examples_of(rng.choice(SAMPLE, (12, 6)).tolist(), 2, feature=f) for f in range(200)]
    made = labels.table(pd.concat(frames), SAMPLE)
    assert len(made) == 200
    assert (made["label"] == "").mean() > 0.9
    assert made[["tokens", "context"]].map(len).mean().max() < 0.1


def test_tokens_that_the_sample_lacks_are_in_labels():
    row = labels.table(examples_of([[1, 999, 2]] * 5, 1), SAMPLE).iloc[0]
    assert row["tokens"] == [" 999"]


def test_the_low_end_of_a_signed_feature_is_told_apart():
    both = pd.concat([examples_of([[1, 50, 2]] * 4, 1), examples_of([[1, 70, 2]] * 4, 1, group="bottom")])
    row = labels.table(both, SAMPLE).iloc[0]
    assert (row["label"], row["tokens"]) == ("50 | low: 70", [" 50"])


def test_labels_show_words_once_and_what_is_no_word_as_it_is_written():
    assert labels._shown([" Goal", "goal", "\n", " <b>"]) == ["Goal", "'\\n'", "<b>"]


def sample_for(folder, model):
    ids = np.arange(200) % 15
    rows = torch.zeros(200, 6)
    Sample(rows, np.arange(200, dtype=np.uint64), np.ones(200, np.int64), ids).write(sample_path(folder.path, model))


def test_labels_of_a_folder_are_a_table_for_each_model(tmp_path):
    folder, said = write_features(tmp_path), []
    with pytest.raises(InputError, match="sample of rows not found"):
        labels.label(folder)
    sample_for(folder, GLP.hook)
    labels.label(folder, [GLP], say=said.append)
    assert folder.table("my sae", "labels")["context"].str.len().eq(1).all()  # as it was
    labels.label(folder, say=said.append)
    for model in (GLP, SAE):
        made = folder.table(model.label, "labels")
        assert made["feature"].tolist() == [f for f in range(model.n_features) if f != DEAD]
    assert [line.split(":")[0] for line in said] == ["glp", "glp", "my sae"]
