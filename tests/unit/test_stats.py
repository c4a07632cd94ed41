"""Running statistics equal NumPy's over all rows at once, however the rows came."""

import numpy as np
import pytest
import torch

from glp_lens.activations.stats import Stats, merge


def rows(n, d=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # A mean far above the spread: sums of squares in one pass would lose everything here.
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) * 1e-3 + 5e4 * torch.arange(1.0, d + 1)).float()


@pytest.mark.parametrize("cuts", [[5003], [1, 5002], [3000, 3, 2000]])
def test_merged_statistics_equal_numpy(cuts):
    x = rows(5003)
    got = merge(Stats.of(part) for part in x.split(cuts))
    wide = x.double().numpy()
    assert got.count == 5003
    np.testing.assert_allclose(got.mean, wide.mean(0), rtol=1e-13)
    np.testing.assert_allclose(got.var, wide.var(0), rtol=1e-6)
    np.testing.assert_array_equal(got.min, wide.min(0))
    np.testing.assert_array_equal(got.max, wide.max(0))
    assert got.mean_norm == pytest.approx(np.linalg.norm(wide, axis=1).mean(), rel=1e-6)


def test_bfloat16_rows_lose_nothing_that_matters_over_many_blocks():
    x = torch.randn(50_001, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    got, wide = Stats.of(x), x.double().numpy()
    assert got.mean.dtype == torch.float64
    np.testing.assert_allclose(got.mean, wide.mean(0), atol=1e-8)
    np.testing.assert_allclose(got.var, wide.var(0), rtol=1e-6)


def test_a_constant_dimension_has_no_variance():
    x = torch.full((5000, 3), 0.1)
    assert Stats.of(x).var.tolist() == [0.0, 0.0, 0.0]
