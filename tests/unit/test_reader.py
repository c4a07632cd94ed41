"""Rows read straight from the bytes of files: any intervals, across shards, and one line if a file changed."""

import numpy as np
import pytest
import torch

from glp_lens.activations.reader import Extent, RowReader, to_tensor
from glp_lens.errors import InputError

D = 5
ROWS = (7, 1, 0, 40, 13)
N = sum(ROWS)


def shards(folder, x):
    """The rows in files, each behind another header and before a trailer."""
    extents, at = [], 0
    for k, n in enumerate(ROWS):
        path = folder / f"shard-{k}"
        path.write_bytes(b"h" * (3 + k) + x[at : at + n].tobytes() + b"t" * 50)
        extents.append(Extent(path, n, 3 + k))
        at += n
    return extents


@pytest.fixture(params=[(D,), ()])
def x(request):
    return np.random.default_rng(0).integers(0, 2**16, (N, *request.param)).astype("<u2")


@pytest.fixture
def reader(tmp_path, x):
    return RowReader(shards(tmp_path, x), x.shape[1:], x.dtype)


def joined(x, starts, stops):
    return np.concatenate([x[a:b] for a, b in zip(starts, stops, strict=True)])


@pytest.mark.parametrize("seed", range(20))
def test_intervals_come_in_the_order_asked_for(reader, x, seed):
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, N + 1, 30)
    stops = np.minimum(starts + generator.integers(0, (3, N)[seed % 2], 30), N)
    np.testing.assert_array_equal(reader.read(starts, stops), joined(x, starts, stops))


def test_neighbours_repeats_and_nothing(reader, x):
    index = np.array([3, 4, 5, 5, 4, 8, 9, N - 1, 0, 1])
    np.testing.assert_array_equal(reader.read(index, index + 1), x[index])
    np.testing.assert_array_equal(reader.read(np.array([0]), np.array([N])), x)
    assert reader.read(np.array([4, 9]), np.array([4, 9])).shape == (0, *x.shape[1:])
    assert reader.read(np.array([], int), np.array([], int)).shape == (0, *x.shape[1:])
    assert len(reader) == N


def test_reads_into_memory_that_is_there(reader, x):
    out = np.zeros((9, *x.shape[1:]), x.dtype)
    assert reader.read(np.array([2]), np.array([8]), out[1:7]) is not None
    np.testing.assert_array_equal(out[1:7], x[2:8])
    assert not out[0].any()
    assert not out[7:].any()


def test_a_file_that_was_cut_or_deleted_is_one_line(reader, tmp_path):
    (tmp_path / "shard-3").write_bytes(b"short")
    with pytest.raises(InputError, match=r"shard-3 cannot be read \(it ends before its last row\): [^\n]+$"):
        reader.read(np.array([0]), np.array([N]))
    (tmp_path / "shard-3").unlink()
    with pytest.raises(InputError, match=r"shard-3 cannot be read \(No such file or directory\): [^\n]+$"):
        reader.read(np.array([0]), np.array([N]))
    assert len(reader.read(np.array([0, 50]), np.array([8, N]))) == N - 42


def test_stored_bits_become_bfloat16_without_a_copy():
    x = torch.randn(3, D).bfloat16()
    bits = x.view(torch.int16).numpy().view(np.uint16).copy()
    assert torch.equal(to_tensor(bits), x)
    bits[0, 0] = 0
    assert to_tensor(bits)[0, 0] == 0
    assert to_tensor(np.ones((2, D), np.float16)).dtype == torch.float16
