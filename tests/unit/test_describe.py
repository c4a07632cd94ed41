"""What is told of a store, against numbers from numpy; and the picture of its norms."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from glp_lens.activations import write_store
from glp_lens.activations.describe import describe_folder, describe_store, stores_in
from glp_lens.activations.manifest import MANIFEST, Manifest
from glp_lens.errors import InputError
from glp_lens.files import write_json
from glp_lens.report.plots import norm_histogram

N, D = 331, 11
SOURCE = {"model": {"name": "tiny"}, "settings": {"context": 24}, "corpus": {"name": "mine", "seed": 3}}


@pytest.fixture
def x():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0))


def change(folder, shard=None, **fields):
    """Rewrite some of a manifest, and of its first shard."""
    manifest = Manifest.read(folder)
    if shard:
        fields["shards"] = (replace(manifest.shards[0], **shard), *manifest.shards[1:])
    write_json(folder / MANIFEST, replace(manifest, **fields).to_json())


def test_numbers_are_those_of_numpy(tmp_path, x):
    x[:, 3] = 7.0
    x[:, 5] += 5000.0
    x[:, 8] *= 900.0
    store = write_store(tmp_path / "s", x, hook="h", source=SOURCE, max_norm=9e9, shard_rows=100)
    found = json.loads(json.dumps(describe_store(store)))
    norms = np.linalg.norm(x.double().numpy(), axis=1)
    assert found["mean_norm"] == pytest.approx(norms.mean(), rel=1e-6)
    assert found["median_norm"] == pytest.approx(np.median(norms), rel=1e-6)
    for level, q in found["norm_quantiles"].items():
        assert q == pytest.approx(np.quantile(norms, float(level)), rel=1e-6)
    assert (found["dead_dims"], found["massive_dims"]) == ([3], [5, 8])
    assert found["bytes"] == sum(file.stat().st_size for file in store.path.glob("*.h5"))
    assert (found["rows"], found["d_in"], found["dtype"], found["shards"], found["hook"]) == (N, D, "float32", 4, "h")
    assert (found["max_norm"], found["corpus"]["name"], found["corpus"]["documents"]) == (9e9, "mine", N)


def test_mostly_dead_dimensions_do_not_make_the_rest_massive(tmp_path, x):
    x[:, 2:] = 0
    found = describe_store(write_store(tmp_path / "s", x, hook="h"))
    assert found["dead_dims"] == list(range(2, D))
    assert found["massive_dims"] == []


def test_rows_that_are_all_alike_have_dead_dimensions_only(tmp_path):
    found = describe_store(write_store(tmp_path / "s", torch.full((7, 3), 2.0), hook="h"))
    assert (found["dead_dims"], found["massive_dims"]) == ([0, 1, 2], [])


def test_what_the_manifest_counts_is_told(tmp_path, x):
    columns = {"mood": np.arange(N), "doc_id": np.arange(N) // 10}
    write_store(tmp_path / "s", x, hook="h", columns=columns, labels={"mood": "int64"})
    change(tmp_path / "s", shard={"excluded": {"bos": 9, "massive": 2}}, examples=["a b", "c"], dropped=(4, 6))
    found = describe_folder(tmp_path / "s")
    assert found["excluded"] == {"bos": 9, "massive": 2}
    assert (found["labels"], found["examples"], found["dropped"]) == ({"mood": "int64"}, ["a b", "c"], [4, 6])
    assert found["corpus"]["documents"] == 34


def test_interrupted_stores_and_parts_are_told_with_their_rows(tmp_path, x):
    write_store(tmp_path / "s", x, hook="h")
    change(tmp_path / "s", complete=False, part=(1, 4))
    found = describe_folder(tmp_path / "s")
    assert (found["complete"], found["part"], found["rows"]) == (False, (1, 4), N)
    assert found["mean_norm"] == pytest.approx(x.norm(dim=1).mean().item(), rel=1e-5)


def test_of_a_stream_only_the_manifest_is_read(tmp_path, x):
    store = write_store(tmp_path / "s", x, hook="h")
    change(tmp_path / "s", window=3)
    (store.path / store.manifest.shards[0].name).unlink()
    found = describe_folder(tmp_path / "s")
    assert (found["window"], found["rows"]) == (3, N)
    assert "mean_norm" not in found


def test_a_store_without_rows_yet(tmp_path, x):
    write_store(tmp_path / "s", x, hook="h")
    change(tmp_path / "s", shards=(), complete=False)
    found = describe_folder(tmp_path / "s")
    assert (found["rows"], found["bytes"], "mean_norm" in found) == (0, 0, False)


def test_stores_of_several_hooks_and_parts_are_found(tmp_path, x):
    places = ["a", "b", "parts/0000-of-0002", "parts/0001-of-0002/a"]
    for name in places:
        write_store(tmp_path / "out" / name, x[:5], hook="h")
    assert stores_in(tmp_path / "out") == [tmp_path / "out" / name for name in places]
    assert stores_in(tmp_path / "out" / "a") == [tmp_path / "out" / "a"]


def test_no_store_there(tmp_path):
    for look in (stores_in, describe_folder):
        with pytest.raises(InputError, match="no activation store at"):
            look(tmp_path)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws a histogram, and gives its axes and its pixels."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    figures = []
    usual = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), usual(self, *a, **k))[1])

    def draw(norms, **options):
        norm_histogram(np.asarray(norms, dtype=np.float32), tmp_path / "new" / "n.png", **options)
        return figures[-1].axes[0], imread(tmp_path / "new" / "n.png")

    return draw


def counted(axes) -> float:
    return sum(patch.get_data().values.sum() for patch in axes.patches)


def test_the_histogram_counts_every_row_and_marks_median_and_limit(drawn):
    norms = np.random.default_rng(0).lognormal(5, 0.2, 1001)
    axes, pixels = drawn(norms, title="some rows", limit=1480.0)
    assert counted(axes) == 1001
    assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx([np.median(norms), 1480.0], rel=1e-5)
    assert (axes.get_xscale(), axes.get_title("left")) == ("log", "some rows")
    assert "units" in axes.get_xlabel()
    assert axes.get_ylabel()
    assert pixels.shape[0] > 400
    assert (pixels[..., :3].min(-1) < 0.9).mean() > 0.02


def test_norms_of_one_size_have_a_linear_axis(drawn):
    axes, _ = drawn(np.linspace(90, 110, 77))
    assert (axes.get_xscale(), counted(axes)) == ("linear", 77)


@pytest.mark.parametrize("norms", [[0.0, 0.0], [3.0], [0.0, 1.0, 50.0], [1e-30, 1e30]])
def test_odd_norms_can_be_drawn(drawn, norms):
    axes, _ = drawn(norms)
    hidden = norms.count(0.0) if axes.get_xscale() == "log" else 0
    assert counted(axes) == len(norms) - hidden
    assert ("1 rows of norm 0" in axes.get_xlabel()) == (hidden == 1)
