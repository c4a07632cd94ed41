"""What a prior is trained on: several layers, another store than before, classes, and data with outliers."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from glp_lens import provenance
from glp_lens.activations import batches as batches_module
from glp_lens.activations import write_store
from glp_lens.errors import InputError
from glp_lens.models import load
from glp_lens.models.gaussian import Gaussian
from glp_lens.models.glp import GLP
from glp_lens.models.normalizer import mean_and_std
from glp_lens.models.sources import Sources
from glp_lens.training import distributed
from glp_lens.training.config import RunOptions, TrainConfig
from tests.conformance import MODES

D, ROWS = 5, 3001
LAYERS = (1, 4, 5)
TINY = {"d_model": 11, "d_mlp": 14, "n_layers": 2}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def hook(layer):
    return f"blocks.{layer}.hook_resid_post"


def rows(n=ROWS, seed=0, layer=1):
    """Gaussian rows whose correlation grows with the layer, off centre."""
    mixing = torch.eye(D) + 0.3 * layer * torch.ones(D, D).tril(-1)
    return torch.randn(n, D, generator=generator(seed)) @ mixing.T * (1 + layer) + torch.arange(D) * layer


def numbered(n=ROWS, layer=1):
    """Rows that tell their layer and index."""
    x = torch.randn(n, D, generator=generator(layer))
    x[:, 0], x[:, 1] = torch.arange(n), layer + x[:, 1] / 30
    return x


def source(**model):
    return {"model": {"name": "lm", "n_layers": 7, "weight_processing": "raw", **model}, "weights": "aa"}


def siblings(folder, make=rows, layers=LAYERS, **options):
    options = {"source": source(), "shard_rows": 800, **options}
    return [write_store(folder / hook(n), make(layer=n), hook=hook(n), **options) for n in layers]


def config(steps=40, batch_size=64, **options):
    return TrainConfig(**{"rows": steps * batch_size, "batch_size": batch_size, "lr": 1e-3, "autocast": False,
                          "sigmas": "stratified", **options})  # fmt: skip


def untrained(store, **options):
    return GLP.fit(store, config(1), **TINY, **options)


def batches(prior, sources, n, settings, start=0):
    """`n` batches in activation units, as the loop gets them."""
    feed = sources.feed(settings, prior)(start)
    return [next(feed) for _ in range(n)]


def as_process(monkeypatch, rank, world):
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world)


def identity_of(batch, prior):
    """Layer and row number of numbered rows."""
    return prior.denormalize(batch.x, batch.layer)[:, [1, 0]].round().int()


# -- several layers --------------------------------------------------------------------------------------------


def test_a_batch_holds_rows_of_all_layers_in_turn_and_each_row_once_an_epoch(tmp_path):
    stores = siblings(tmp_path, numbered)
    prior, sources, settings = untrained(stores), Sources.of(stores), config(batch_size=64)
    seen = []
    for batch in batches(prior, sources, 3 * ROWS // 64, settings):
        found = identity_of(batch, prior)
        assert torch.equal(found[:, 0], batch.layer.int())
        assert batch.layer.bincount().tolist() == [0, 22, 0, 0, 21, 21]
        seen.append(found)
    for layer in LAYERS:
        own = torch.cat(seen)
        own = own[own[:, 0] == layer, 1]
        assert len(own[:ROWS].unique()) == min(ROWS, len(own))
    first = [found[found[:, 0] == layer, 1][:20].tolist() for found in seen[:1] for layer in LAYERS]
    assert first[0] != first[1], "each layer comes in an order of its own"


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_out_the_rows_of_one(tmp_path, monkeypatch, world):
    stores = siblings(tmp_path, numbered)
    prior, sources, settings = untrained(stores), Sources.of(stores), config(batch_size=52)
    whole = [batch.x for batch in batches(prior, sources, 5, settings, start=90)]
    parts = []
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        parts.append([batch.x for batch in batches(prior, sources, 5, settings, start=90)])
    for step, want in enumerate(whole):
        assert torch.equal(torch.cat([part[step] for part in parts]), want)


def test_training_goes_on_bit_for_bit_from_any_step(tmp_path):
    stores = siblings(tmp_path, numbered)
    prior, sources, settings = untrained(stores), Sources.of(stores), config(batch_size=100)
    later = batches(prior, sources, 3, settings, start=100)
    for got, want in zip(later, batches(prior, sources, 103, settings)[100:], strict=True):
        assert torch.equal(got.x, want.x)
        assert torch.equal(got.layer, want.layer)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return siblings(tmp_path_factory.mktemp("siblings"))


@pytest.fixture(scope="module")
def prior(stores, tmp_path_factory):
    held = siblings(tmp_path_factory.mktemp("held"), lambda layer: rows(701, 9, layer))
    settings = config(steps=450, batch_size=256, lr=6e-3)
    return GLP.fit(stores[::-1], settings, d_model=24, d_mlp=40, n_layers=2, validation=held)


def test_each_layer_comes_near_the_best_loss_that_its_covariance_allows(prior, stores):
    for layer, store in zip(LAYERS, stores, strict=True):
        view = prior.at(layer)
        x, eps = rows(4000, 3, layer), torch.randn(4000, D, generator=generator(4))
        sigma = ((torch.arange(4000) + 0.5) / 4000)[torch.randperm(4000, generator=generator(5))]
        z = view.normalize(x)
        noisy = (1 - sigma[:, None]) * z + sigma[:, None] * eps
        loss = float((view.velocity(noisy, sigma) - (eps - z)).square().mean())
        best = math.pi / 2 * float(torch.linalg.eigvalsh(z.T.cov()).sqrt().mean())
        assert best * 0.97 < loss < best * 1.08, layer
        assert Gaussian.fit(store).optimal_loss_mean() == pytest.approx(best, rel=0.03)
    assert prior.history[-1]["validation_loss"] < 0.95 * prior.history[0]["validation_loss"]


def test_a_view_is_the_prior_at_that_layer(prior):
    x, noise = rows(9, layer=4), torch.randn(9, D, generator=generator(1))
    for view in (prior.at(4), prior.at(hook(4)), prior.at(1).at(4)):
        assert view.denoiser is prior.denoiser
        assert torch.equal(view.normalize(x), prior.normalize(x, 4))
        assert torch.equal(view.denormalize(x), prior.denormalize(x, layer=4))
        assert torch.equal(view.velocity(x, 0.3), prior.velocity(x, 0.3, 4))
        assert torch.equal(view.encode(x, noise=noise), prior.encode(x, noise=noise, layer=4))
        assert torch.equal(view.project(x, u=0.5, noise=noise), prior.project(x, u=0.5, noise=noise, layer=4))
        assert torch.equal(view.sample(9, noise=noise), prior.sample(9, noise=noise, layer=4))
        assert torch.equal(view.score(x, noise=noise), prior.score(x, noise=noise, layer=4))
    assert torch.equal(prior.at(4).encode(x, layer=1, noise=noise), prior.encode(x, layer=1, noise=noise))


def test_layers_without_training_are_known_and_refused(prior, tmp_path):
    for glp in (prior, load(prior.save_pretrained(tmp_path / "glp"))):
        assert glp.layers == list(LAYERS)
        x = rows(4)
        for wrong in (2, torch.tensor([1, 1, 4, 6])):
            for use in (glp.normalize, glp.denormalize, glp.encode, glp.project, glp.score):
                with pytest.raises(InputError, match="trained on layers 1, 4, 5, got") as error:
                    use(x, layer=wrong)
                assert "\n" not in str(error.value)
        for wrong in (0, hook(3), "hook_embed", 7):
            with pytest.raises(InputError, match="trained on layers 1, 4, 5"):
                glp.at(wrong)
        with pytest.raises(InputError, match="trained on layers 1, 4, 5"):
            glp.projection_hook(hook(0))
        for use in (glp.encode, glp.project):
            with pytest.raises(InputError, match="layer"):
                use(x)


def test_a_multi_layer_prior_knows_each_of_its_hook_points(prior, stores):
    assert prior.hook is None
    for layer, store in zip(LAYERS, stores, strict=True):
        assert prior.at(layer).hook == store.hook
        assert provenance.trained_on(prior.at(layer)) == store.provenance()
        assert prior.projection_hook(store.hook)[0] == store.hook
    with pytest.raises(InputError, match=r"trained at blocks\.4\.hook_resid_post \(here blocks\.4\.hook_resid_pre\)"):
        prior.projection_hook("blocks.4.hook_resid_pre")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: {"make": lambda layer: rows(ROWS - layer, layer=layer)}, "differ in texts"),
        (lambda: {"make": lambda layer: rows(layer=layer)[:, : D - layer % 2]}, "differ in width"),
        (lambda: {"source": {"model": {"name": "lm"}}}, "pass lm_layers="),
        (lambda: {"source": source(n_layers=5)}, "layers run from 0 to 4 .* got 5"),
    ],
)
def test_stores_that_are_no_siblings_are_refused(tmp_path, change, words):
    with pytest.raises(InputError, match=words) as error:
        untrained(siblings(tmp_path, **change()))
    assert "\n" not in str(error.value)


def test_siblings_are_of_one_model_and_different_layers(tmp_path, stores):
    other = write_store(tmp_path / "other", rows(layer=2), hook=hook(2), source=source(name="else"))
    with pytest.raises(InputError, match="differ in language model"):
        untrained([stores[0], other])
    with pytest.raises(InputError, match="different layers"):
        untrained([stores[0], stores[0]])
    kind = write_store(tmp_path / "kind", rows(layer=2), hook="blocks.2.hook_mlp_out", source=source())
    with pytest.raises(InputError, match="one hook point in each layer"):
        untrained([stores[0], kind])
    with pytest.raises(InputError, match="rows of all 3 layers"):
        GLP.fit(stores, config(4, batch_size=2), **TINY)
    with pytest.raises(InputError, match="held-out sibling stores"):
        untrained(stores, validation=rows(30))
    with pytest.raises(InputError, match=r"no store of held-out rows at blocks\.4"):
        untrained(stores, validation=[stores[0], stores[2]])


def test_one_store_can_be_a_prior_conditioned_on_the_layer(stores):
    assert untrained(stores[1], lm_layers=7).layers == [4]
    assert untrained([stores[1]]).layers == []
    assert untrained({store.hook: store for store in stores}).layers == list(LAYERS)


# -- finetuning ------------------------------------------------------------------------------------------------


def shifted(folder, **options):
    """The store of another language model: rows of layer 1 that are wider and elsewhere."""
    options = {"source": source(name="lm-instruct"), "hook": hook(1), **options}
    return write_store(folder, rows(seed=7) * 1.5 + 2, **options)


@pytest.fixture(scope="module")
def base(stores):
    return GLP.fit(stores[0], config(steps=120, batch_size=128, lr=5e-3), **TINY)


def weights(glp):
    return {name: p.clone() for name, p in glp.denoiser.state_dict().items()}


def test_finetuning_gives_a_new_prior_of_the_same_normalised_space(base, tmp_path):
    new, before = shifted(tmp_path / "new"), weights(base)
    held = rows(500, seed=8) * 1.5 + 2
    tuned = base.finetune(new, config(steps=120, batch_size=128, lr=4e-3), validation=held)
    assert torch.equal(tuned.mean, base.mean)
    assert torch.equal(tuned.var, base.var)
    assert all(torch.equal(p, before[name]) for name, p in base.denoiser.state_dict().items())
    assert tuned.history[-1]["validation_loss"] < 0.9 * tuned.history[0]["validation_loss"]
    assert tuned.score(held).mean() > base.score(held).mean()
    assert tuned.provenance["store"] == new.provenance()
    assert tuned.provenance["finetuned_from"]["provenance"] == base.provenance
    again = load(tuned.save_pretrained(tmp_path / "tuned"))
    assert again.provenance == tuned.provenance


def test_finetuning_starts_from_the_weights_and_resumes(base, tmp_path, monkeypatch):
    new, settings = shifted(tmp_path / "new"), config(steps=30, ema=0.9)
    still = base.finetune(new, config(steps=1, lr=1e-30))
    assert all(torch.equal(p, weights(base)[name]) for name, p in still.denoiser.state_dict().items())
    want = base.finetune(new, settings)

    def stop(entry):
        if entry["step"] == 17:
            raise KeyboardInterrupt

    run = RunOptions(state=tmp_path / "state", save_seconds=-1.0, checkpoints=tmp_path / "c", snapshots=4)
    with pytest.raises(KeyboardInterrupt):
        base.finetune(new, settings, run=replace(run, on_entry=stop))
    got = base.finetune(new, settings, run=run)
    assert all(torch.equal(p, weights(want)[name]) for name, p in got.denoiser.state_dict().items())
    last = load(tmp_path / "c" / "step_00000030")
    assert torch.equal(last.encode(rows(5)), got.encode(rows(5)))
    assert [entry["step"] for entry in last.history] == [entry["step"] for entry in got.history]
    assert last.provenance["finetuned_from"] == got.provenance["finetuned_from"]
    early = load(tmp_path / "c" / "step_00000003")
    assert early.history[-1]["step"] == 3
    assert early.provenance["training"]["rows_seen"] == 3 * 64
    with pytest.raises(InputError, match="other settings or data"):
        got.finetune(new, settings, run=RunOptions(state=tmp_path / "state"))


def test_finetuning_refuses_other_places_and_accepts_other_models(base, prior, stores, tmp_path):
    tiny = config(1)
    wide = write_store(tmp_path / "wide", torch.randn(90, D + 1, generator=generator()), hook=hook(1))
    with pytest.raises(InputError, match=r"width 5 \(here 6\)"):
        base.finetune(wide, tiny, allow_mismatch=True)
    with pytest.raises(InputError, match=r"at blocks\.1.*here blocks\.4.*allow_mismatch"):
        base.finetune(stores[1], tiny)
    base.finetune(stores[1], tiny, allow_mismatch=True)
    centred = shifted(tmp_path / "centred", source=source(weight_processing="centred"))
    with pytest.raises(InputError, match="raw weights .*here centred"):
        base.finetune(centred, tiny)
    with pytest.raises(InputError, match="of one layer, got 3 stores"):
        base.finetune(stores, tiny)
    strange = siblings(tmp_path, layers=(1, 2))
    with pytest.raises(InputError, match="trained on layers 1, 4, 5, got 2"):
        prior.finetune(strange, tiny)
    with pytest.raises(InputError, match="takes no condition"):
        base.finetune(stores[0], tiny, condition="label")


def test_a_released_prior_with_a_dimension_of_no_variance_is_finetuned(base, tmp_path):
    """This library's own have 1 there; others say 0."""
    var = base.var.clone()
    var[2] = 0
    released = GLP(base.denoiser, base.mean, var)
    tuned = released.finetune(shifted(tmp_path / "new"), config(3), validation=rows(30))
    assert math.isfinite(tuned.history[-1]["validation_loss"])
    assert torch.equal(tuned.var, var)


def test_a_multi_layer_prior_is_finetuned_on_some_of_its_layers(prior, tmp_path):
    tuned = prior.finetune(shifted(tmp_path / "new"), config(5))
    assert tuned.at(1).hook == hook(1)
    assert tuned.layers == prior.layers
    assert torch.equal(tuned.mean[4], prior.mean[4])


# -- conditions ------------------------------------------------------------------------------------------------

CENTRES = {2: torch.tensor([4.0, 0, 0, 0, -2]), 7: torch.tensor([-4.0, 1, 0, 0, 2])}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Two classes at two places, one three times as frequent, and rows without a class anywhere."""
    values = torch.tensor([2, 7, 7, 7])[torch.randint(4, (6000,), generator=generator(1))]
    x = torch.stack([CENTRES[int(value)] for value in values]) + torch.randn(6000, D, generator=generator(2)) / 2
    label = values.numpy().copy()
    label[::10] = -1
    return write_store(tmp_path_factory.mktemp("labelled") / "store", x, hook=hook(1), columns={"kind": label},
                       labels={"kind": "int64"})  # fmt: skip


@pytest.fixture(scope="module")
def conditional(labelled):
    return GLP.fit(labelled, config(steps=350, batch_size=256, lr=6e-3, ema=0.95), d_model=32, d_mlp=48, n_layers=2,
                   condition="kind")  # fmt: skip


def test_samples_of_a_class_have_its_mean_and_others_the_mixtures(conditional, labelled):
    for value, centre in CENTRES.items():
        x = conditional.sample(1500, steps=12, condition=conditional.class_vectors[value], generator=generator(3))
        torch.testing.assert_close(x.mean(0), centre, atol=0.35, rtol=0)
        assert x.std(0).max() < 1
    x = conditional.sample(3000, steps=12, generator=generator(4))
    torch.testing.assert_close(x.mean(0), labelled.stats.mean.float(), atol=0.5, rtol=0)
    assert x[:, 0].std() > 2.5


def test_classes_are_saved_with_the_prior(conditional, tmp_path):
    again = load(conditional.save_pretrained(tmp_path / "glp"))
    assert list(again.class_vectors) == [2, 7]
    assert all(torch.equal(again.class_vectors[c], conditional.class_vectors[c]) for c in CENTRES)
    assert again.provenance["training"]["condition"] == "kind"


@pytest.mark.parametrize("kind", ["int64", "float32"])
def test_rows_keep_their_class_over_epochs_processes_and_resumes(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(batches_module, "WINDOW_BYTES", 256 * D * 4)  # several windows of rows, one of the classes
    n = 1003
    x = numbered(n)
    label = np.arange(n) % 7 - 1
    missing = label < 0
    if kind == "float32":
        label = np.where(missing, np.nan, label)
    store = write_store(tmp_path / "s", x, hook=hook(1), columns={"kind": label}, labels={"kind": kind}, shard_rows=300)
    vectors = torch.randn(6, 3, generator=generator())
    prior, settings = untrained(store, condition="kind", vectors=vectors), config(batch_size=90)
    sources = Sources.of(store, label="kind", vectors=vectors)
    for rank, world, start in ((0, 1, 0), (0, 2, 11), (1, 2, 40)):
        as_process(monkeypatch, rank, world)
        for batch in batches(prior, sources, 25, settings, start):
            index = identity_of(batch, prior)[:, 1].long()
            want = torch.cat([torch.full((1, 3), torch.nan), vectors])[(index % 7).long()]
            assert torch.equal(batch.condition.nan_to_num(9.0), want.nan_to_num(9.0))


def test_classes_of_several_layers(tmp_path):
    label = np.arange(ROWS) % 3
    stores = siblings(tmp_path, numbered, columns={"kind": label}, labels={"kind": "int64"})
    prior, sources = untrained(stores, condition="kind"), Sources.of(stores, label="kind")
    for batch in batches(prior, sources, 4, config()):
        assert torch.equal(batch.condition.argmax(1), identity_of(batch, prior)[:, 1].long() % 3)


def test_classes_layers_and_massive_rows_do_not_depend_on_the_callers_modes(tmp_path):
    def make(layer):
        x = rows(301, layer=layer)
        x[5] *= 1e3
        return x

    label = {"columns": {"kind": np.arange(301) % 3}, "labels": {"kind": "int64"}}
    stores = siblings(tmp_path / "train", make, (1, 4), **label)
    held_out = siblings(tmp_path / "held-out", make, (1, 4), **label)
    probe = rows(7, seed=2)

    def fit():
        prior = GLP.fit(stores, config(3, autocast=True), condition="kind", validation=held_out, **TINY)
        x, condition = probe.clone(), prior.class_vectors[1.0]
        return [
            *prior._tensors().values(),
            torch.tensor([entry["validation_loss"] for entry in prior.history], dtype=torch.float64),
            prior.at(4).project(x, condition=condition, guidance=2.0),
            prior.log_density(x, steps=3, layer=torch.tensor([1, 4, 4, 1, 4, 1, 1]), condition=condition).value,
        ]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the massive rows
        want = fit()
        for name, mode in MODES.items():
            with mode():
                got = fit()
            for ours, theirs in zip(got, want, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=name)


def test_held_out_stores_are_scored_with_their_classes_and_rows_without(labelled, conditional):
    sources = Sources.of(labelled, label="kind", vectors=conditional.class_vectors)
    batch = sources.held_out(sources, conditional)
    known = batch.condition.isfinite().all(1)
    assert len(batch) == 2048
    assert 0.87 < known.float().mean() < 0.93
    x = conditional.denormalize(batch.x[known])
    centres = torch.stack([CENTRES[2], CENTRES[7]])[batch.condition[known].argmax(1)]
    torch.testing.assert_close((x - centres).mean(0), torch.zeros(D), atol=0.1, rtol=0)
    assert sources.held_out(rows(40), conditional).condition.isnan().all()


def test_a_prior_of_one_layer_is_validated_on_its_store_among_siblings(stores, tmp_path):
    sources, prior = Sources.of(stores[1]), untrained(stores[1])
    batch = sources.held_out(Sources.of(stores), prior)
    of_layer = sources.held_out(Sources.of(stores[1]), prior)
    assert sorted(batch.x.tolist()) == sorted(of_layer.x.tolist())
    wide = write_store(tmp_path / "wide", torch.randn(90, D + 1, generator=generator()), hook=hook(LAYERS[1]))
    with pytest.raises(InputError, match="no store of held-out rows at blocks.4.*of width 5"):
        sources.held_out(Sources.of(wide), prior)


def test_labels_that_cannot_condition_are_refused(labelled, tmp_path):
    with pytest.raises(InputError, match="no column 'sort'"):
        untrained(labelled, condition="sort")
    with pytest.raises(InputError, match="classes without a vector, such as 7"):
        untrained(labelled, condition="kind", vectors=torch.zeros(7, 3))
    with pytest.raises(InputError, match="name its column"):
        untrained(labelled, vectors=torch.zeros(8, 3))
    with pytest.raises(InputError, match=r"\(n_classes, d_condition\)"):
        untrained(labelled, condition="kind", vectors=torch.zeros(8))
    many = write_store(tmp_path / "many", rows(1500), hook="h", columns={"y": np.linspace(0, 1, 1500)},
                       labels={"y": "float32"})  # fmt: skip
    with pytest.raises(InputError, match="1500 classes"):
        untrained(many, condition="y")
    none = write_store(tmp_path / "none", rows(100), hook="h", columns={"y": np.full(100, -1)}, labels={"y": "int64"})
    with pytest.raises(InputError, match="negative or NaN everywhere"):
        untrained(none, condition="y")


# -- robust data -----------------------------------------------------------------------------------------------


def with_outliers(folder, x, every=97, times=1e4):
    bad = x.clone()
    bad[::every] = bad[::every] * times + 500 * times
    return write_store(folder, bad, hook=hook(1), shard_rows=900)


def test_massive_rows_spoil_neither_normaliser_nor_loss(tmp_path):
    x = rows(4000) * torch.tensor([1.0, 0.01, 3, 1, 1]) + 40
    keep = torch.arange(4000) % 97 != 0
    clean = write_store(tmp_path / "clean", x[keep], hook=hook(1))
    spoilt = with_outliers(tmp_path / "spoilt", x)
    held, settings = rows(900, seed=4) * torch.tensor([1.0, 0.01, 3, 1, 1]) + 40, config(steps=120, lr=5e-3)
    want = GLP.fit(clean, settings, **TINY, validation=held)
    with pytest.warns(UserWarning, match=r"42 of 4000 rows are massive .*beyond the gap.*massive=None") as caught:
        got = GLP.fit(spoilt, settings, **TINY, validation=torch.cat([held, torch.full((9, D), 1e7)]))
    told = next(each for each in caught if "massive" in str(each.message))
    assert told.filename == __file__
    torch.testing.assert_close(got.mean, want.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.var, want.var, rtol=1e-6, atol=0)
    for key in ("loss", "validation_loss"):
        tail = [sum(entry[key] for entry in glp.history[-10:]) / 10 for glp in (got, want)]
        assert tail[0] == pytest.approx(tail[1], rel=0.05), key
    norms = spoilt.column("norm")
    assert norms[keep.numpy()].max() < got.max_norm < norms[~keep.numpy()].min()
    assert got.provenance["training"]["massive_rows"] == 42
    with pytest.warns(UserWarning, match="10 times the median"):
        old = GLP.fit(spoilt, config(steps=1), **TINY, massive=10.0)
    assert old.max_norm == pytest.approx(10 * spoilt.median_norm)
    _, projects = got.projection_hook()
    row = torch.full((1, 1, D), 1e6)
    assert torch.equal(projects(row), row)


def test_massive_rows_do_not_count_in_the_loss(tmp_path):
    """Whatever they hold, and the others count for them: the mean is that of the others."""
    spoilt = with_outliers(tmp_path / "spoilt", rows(2000), every=4)
    with pytest.warns(UserWarning, match="500 of 2000 rows"):
        sources, prior = Sources.of(spoilt, massive=3.0), untrained(spoilt, massive=3.0)
    got = batches(prior, sources, 30, config(batch_size=64))
    weight = torch.cat([batch.weight for batch in got])
    x = torch.cat([batch.x for batch in got])
    assert weight.mean() == pytest.approx(1, abs=0.03)
    assert weight.unique().tolist() == pytest.approx([0, 2000 / 1500])
    assert x.isfinite().all()
    assert x.abs().max() < 10


def test_stores_without_massive_rows_are_left_alone(tmp_path, stores):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior = untrained(stores[0])
    assert prior.max_norm is None
    assert next(Sources.of(stores[0], massive=10.0).feed(config(), prior)(0)).weight is None
    spoilt = with_outliers(tmp_path / "spoilt", rows())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert untrained(spoilt, massive=None).var.max() > 1e9
    with pytest.raises(InputError, match="massive must be over 1"):
        untrained(spoilt, massive=0.5)


@pytest.mark.parametrize("spread", [1e-9, 1e-6, 0.0])
def test_a_nearly_constant_dimension_is_a_constant_one(tmp_path, monkeypatch, spread):
    x = rows(900).double()
    x[:, 2] = 0.25 + spread * torch.randn(900, generator=generator(), dtype=torch.float64)
    store = write_store(tmp_path / "s", x.float(), hook="h")
    with pytest.warns(UserWarning, match="1 of 5 activation dimensions are constant"):
        mean, std = mean_and_std(store)
    assert std[2] == 1
    assert mean[2] == pytest.approx(0.25)
    torch.testing.assert_close(std[[0, 1, 3, 4]], x.std(0, correction=0)[[0, 1, 3, 4]].float())
    as_process(monkeypatch, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the main process has said it
        Sources.of(store).statistics()
    as_process(monkeypatch, 0, 1)
    with pytest.warns(UserWarning, match="are constant"):
        glp = untrained(store)
    edited = x[:5].float()
    edited[:, 2] += 0.01
    assert (glp.project(edited, sigma=0.1) - edited)[:, 2].abs().max() < 1
    with pytest.warns(UserWarning, match="are constant"):
        truth = Gaussian.fit(store, diagonal=True)
    assert truth.score(x.float()).isfinite().all()


def test_a_wide_denoiser_is_trained_at_a_lower_peak_also_in_finetuning(tmp_path):
    store = write_store(tmp_path / "store", rows(), hook=hook(1))
    settings = config(2, lr=8e-3, lr_width=22)
    prior = GLP.fit(store, settings, d_model=44, d_mlp=14, n_layers=1)
    for trained in (prior, prior.finetune(store, settings)):
        made_by = trained.provenance["training"]["config"]
        assert (made_by["lr"], made_by["lr_width"]) == (4e-3, 0)
        assert trained.history[0]["lr"] <= 4e-3
