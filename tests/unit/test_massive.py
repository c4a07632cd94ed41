"""The norm above which activations are massive: found from the gap in the data."""

import math

import pytest
import torch

from glp_lens.activations.massive import check_massive, norm_limit
from glp_lens.errors import InputError
from tests.conftest import tiny_texts

D = 40


def normal(n, seed=0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def shifted_cluster():
    """As Gemma 3: one dimension nearly constant and most of the norm, ten outliers at 9 to 10 times the median norm."""
    x = 1250 / math.sqrt(D) * normal(2000)
    x[:, 3] += 5207
    outliers = torch.nn.functional.normalize(normal(10, seed=1)) * torch.linspace(48_000, 56_500, 10)[:, None]
    return torch.cat([x, outliers])


def test_a_cluster_of_massive_rows_is_left_out_whole_where_a_multiple_of_the_median_cuts_it():
    x = shifted_cluster()
    norms = x.norm(dim=1)
    limit = norm_limit(x, "gap")
    assert (norms > limit).nonzero()[:, 0].tolist() == list(range(2000, 2010))
    assert 0 < int((norms > norm_limit(x, 10.0)).sum()) < 10
    assert norm_limit(x, 10.0) == pytest.approx(10 * float(norms.double().quantile(0.5)), rel=1e-6)


def test_a_cluster_counts_as_massive_beside_still_longer_rows():
    x = torch.cat([normal(1000), 10 * normal(5, seed=1), 1000 * normal(1, seed=2)])
    assert int((x.norm(dim=1) > norm_limit(x, "gap")).sum()) == 6


@pytest.mark.parametrize("x", [normal(1000), normal(1000) * torch.linspace(1, 5, 1000)[:, None]])
def test_without_a_gap_it_is_ten_times_the_typical_distance(x):
    limit = norm_limit(x, "gap")
    assert float(x.norm(dim=1).max()) < limit
    assert limit == pytest.approx(10 * float(x.norm(dim=1).median()), rel=0.05)
    further = 9 * x + 50  # the same, elsewhere: 10 distances in any direction are still within it
    centre = further.median(0).values
    away = centre + 9.9 * 9 * float(x.norm(dim=1).median()) * torch.nn.functional.normalize(centre, dim=0)
    assert float(away.norm()) < norm_limit(further, "gap")


def test_rows_that_are_alike_few_or_in_two_clusters_have_a_limit_that_keeps_them():
    two = torch.cat([normal(550), normal(450, seed=1) + 10])
    alike = torch.cat([torch.ones(600, D), 3 * normal(400)])
    for x in (torch.ones(7, D), normal(1), torch.zeros(3, D), torch.ones(500, D), two, alike, 1000 + normal(20)):
        assert not (x.norm(dim=1) > norm_limit(x, "gap")).any()
    assert norm_limit(normal(5), None) is None
    assert norm_limit(torch.empty(0, D), "gap") is None


def test_a_collection_that_begins_with_one_word_keeps_its_rows(tiny_bridge, tmp_path):
    from glp_lens.activations import collect

    texts = [*["cat"] * 40, *tiny_texts(30)]
    store = collect(tiny_bridge, texts, out=tmp_path / "acts", context=24, shard_tokens=24)
    assert store.manifest.excluded["massive"] == 0


@pytest.mark.parametrize("wrong", [0.5, 1, math.inf, math.nan, "ten", True, -3])
def test_other_rules_are_refused(wrong):
    with pytest.raises(InputError, match="massive must be over 1"):
        check_massive(wrong)
