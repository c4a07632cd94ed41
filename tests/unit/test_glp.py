"""The generative latent prior: learnt on a Gaussian, whose flow is known in closed form, saved, and loaded."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from glp_lens.activations import write_store
from glp_lens.errors import InputError
from glp_lens.models import batching, load
from glp_lens.models.denoiser import Denoiser
from glp_lens.models.gaussian import Gaussian
from glp_lens.models.glp import GLP
from glp_lens.models.normalizer import Normalizer
from glp_lens.training.config import TrainConfig

D = 6
GOLDEN = Path(__file__).parents[1] / "golden"
MIXING = torch.randn(D, D, generator=torch.Generator().manual_seed(5)) * torch.linspace(0.5, 3, D)
MEAN = torch.linspace(-4, 9, D)


def rows(n, seed=0):
    """Correlated Gaussian rows, off centre, with unequal scales."""
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) @ MIXING + MEAN


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("stores") / "store", rows(20_001), hook="blocks.1.hook_resid_post")


@pytest.fixture(scope="module")
def glp(store):
    config = TrainConfig(rows=256 * 1500, batch_size=256, lr=3e-3, sigmas="stratified", autocast=False)
    return GLP.fit(store, config, d_model=32, d_mlp=64, n_layers=2, validation=rows(500, seed=8))


@pytest.fixture(scope="module")
def truth(store):
    """The best Gaussian prior of the same rows, exact here."""
    return Gaussian.fit(store)


# -- what was learnt -------------------------------------------------------------------------------------------


def test_velocity_is_near_the_closed_form(glp, truth):
    z = torch.randn(4000, D, generator=generator(1))
    for sigma in (0.3, 0.6, 0.9):
        x = truth.normalize(rows(4000, seed=2))
        at = (1 - sigma) * x + sigma * z
        want = truth.velocity(at, sigma)
        error = (glp.velocity(at, sigma) - want).square().mean() / want.square().mean()
        assert error < 0.05, sigma


def test_samples_have_the_moments_of_the_data(glp):
    x = glp.normalize(glp.sample(8000, steps=50, generator=generator(3)))
    want = glp.normalize(rows(50_000, seed=4))
    torch.testing.assert_close(x.mean(0), want.mean(0), atol=0.12, rtol=0)
    torch.testing.assert_close(x.T.cov(), want.T.cov(), atol=0.2, rtol=0)


@pytest.mark.parametrize("sigma", [0.2, 0.5])
def test_projection_shrinks_each_direction_as_the_flow_of_a_gaussian_does(glp, truth, sigma):
    """Noised to z = (1 - s) x + s eps, a direction of variance v flows back to z sqrt(v / ((1-s)^2 v + s^2))."""
    x = rows(6000, seed=6)
    got = truth.normalize(glp.project(x, sigma=sigma, steps=60, generator=generator(7))) @ truth.eigenvectors
    x = truth.normalize(x) @ truth.eigenvectors
    slope = (got * x).sum(0) / x.square().sum(0)
    v = truth.eigenvalues
    want = (1 - sigma) * (v / ((1 - sigma) ** 2 * v + sigma**2)).sqrt()
    torch.testing.assert_close(slope, want, atol=0.1, rtol=0)


def test_projection_brings_rows_off_the_manifold_nearer(glp, truth):
    away = truth.denormalize(5 * truth.eigenvectors[:, -1].expand(500, D).contiguous())
    back = glp.project(away, sigma=0.5, generator=generator())
    assert truth.score(back).mean() > truth.score(away).mean() + 10


def test_typical_rows_score_higher(glp):
    x = rows(400, seed=9)
    shuffled = x.gather(0, torch.rand(x.shape, generator=generator()).argsort(0))
    assert glp.score(x).mean() > glp.score(shuffled).mean() + 0.1
    assert glp.score(x).shape == (400,)


def test_log_density_is_near_the_truth_in_its_own_units(glp, truth):
    x = rows(300, seed=9)
    got, want = glp.score(x, method="ode"), truth.score(x)
    assert float(torch.stack([got, want]).corrcoef()[0, 1]) > 0.95
    assert abs(float((got - want).mean())) < 0.3
    estimate = glp.log_density(x, probes=16, generator=generator(1))
    off = (estimate.value - got) / estimate.error
    assert 0.8 < float(off.square().mean().sqrt()) < 1.4


@pytest.mark.parametrize("sigma", [0.2, 0.5])
def test_one_step_of_projection_is_near_the_posterior_mean(glp, truth, sigma):
    x, eps = rows(500, seed=6), torch.randn(500, D, generator=generator(7))
    got = glp.normalize(glp.project(x, sigma=sigma, steps=1, noise=eps))
    noised = glp.normalize(x) + sigma / (1 - sigma) * eps
    want = truth.normalize(truth.project(truth.denormalize(noised), sigma=sigma))
    assert float((got - want).square().mean() / want.square().mean()) < 0.01


@pytest.mark.parametrize("options", [{"sigma": 0.3}, {"sigma": 0.6, "fast": True}])
def test_projections_in_bfloat16_are_within_its_rounding(glp, options):
    """Each activation is rounded to 8 bits in a few products: a few thousandths of the spread, and not nothing."""
    x, eps = rows(500, seed=6), torch.randn(500, D, generator=generator(7))
    exact = glp.normalize(glp.project(x, noise=eps, **options))
    off = (glp.normalize(glp.project(x, noise=eps, dtype=torch.bfloat16, **options)) - exact).norm(dim=1)
    assert 0 < off.median() < 0.01
    assert off.max() < 0.1


def test_projections_in_bfloat16_follow_the_weights(glp):
    x, prior = rows(20), copy.deepcopy(glp)
    before = prior.project(x, sigma=0.5, dtype=torch.bfloat16)
    with torch.no_grad():
        for weight in prior.denoiser.parameters():
            weight.mul_(0.5)
    fresh = GLP(copy.deepcopy(prior.denoiser), prior.mean, prior.var)
    after = prior.project(x, sigma=0.5, dtype=torch.bfloat16)
    assert torch.equal(after, fresh.project(x, sigma=0.5, dtype=torch.bfloat16))
    assert not torch.equal(after, before)


def test_a_classifier_draws_from_the_tilted_gaussian(glp):
    """The density times `exp(a.x)`: a Gaussian whose mean has moved by the covariance times a."""
    a = torch.randn(D, generator=generator(2)) / 10
    moved = glp.sample(4000, steps=50, classifier=lambda x: x @ a, generator=generator(3)).mean(0) - MEAN
    want = MIXING.T @ MIXING @ a
    assert float((moved - want).norm() / want.norm()) < 0.15


def test_provenance_and_curve_tell_the_training(glp, store):
    training = glp.provenance["training"]
    assert training["rows_seen"] == 256 * 1500
    assert training["rows_distinct"] == 20_001
    assert training["parameters"] == sum(p.numel() for p in glp.denoiser.parameters())
    assert glp.provenance["store"]["manifest_hash"] == store.provenance()["manifest_hash"]
    assert glp.hook == "blocks.1.hook_resid_post"
    assert glp.history[-1]["validation_loss"] < glp.history[0]["validation_loss"]


def quick(store, seed=0, **options):
    return GLP.fit(store, TrainConfig(rows=40 * 64, batch_size=64, lr=1e-3, seed=seed), d_model=10, d_mlp=22, **options)


def test_a_constant_dimension_warns_and_stays_where_it_is(tmp_path):
    x = rows(900)
    x[:, 2] = 5.0
    with pytest.warns(UserWarning, match="1 of 6 activation dimensions are constant"):
        glp = quick(write_store(tmp_path / "store", x, hook="h"), n_layers=2)
    for y in (glp.sample(200, generator=generator()), glp.project(x, u=0.5), glp.encode(x)):
        assert y.isfinite().all()
    assert (glp.project(x, sigma=0.1, generator=generator())[:, 2] - 5).abs().max() < 1
    assert torch.equal(glp.denormalize(glp.normalize(x))[:, 2], x[:, 2])


@pytest.mark.parametrize("seed", [0, 20_261_122, 2**31 - 1])
def test_any_seed_trains_and_repeats(store, seed):
    one, two = quick(store, seed), quick(store, seed)
    assert all(torch.equal(a, b) for a, b in zip(one.denoiser.parameters(), two.denoiser.parameters(), strict=True))


def test_validation_rows_of_another_width_are_refused(store):
    with pytest.raises(InputError, match=r"shape \(n, 6\), got \(40, 5\)"):
        quick(store, validation=torch.zeros(40, 5))


# -- using it --------------------------------------------------------------------------------------------------


def test_noise_of_a_row_does_not_depend_on_the_batching(glp, monkeypatch):
    x, sigmas = rows(23), torch.linspace(0, 1, 23)

    def everything():
        return [
            glp.encode(x, generator=generator(1)),
            glp.project(x, u=0.5, generator=generator(1)),
            glp.sample(23, generator=generator(1)),
            glp.score(x, generator=generator(1)),
            glp.velocity(x, sigmas),
        ]

    whole = everything()
    monkeypatch.setattr(batching, "ROWS", 5)
    for got, want in zip(everything(), whole, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_noise_overrides_the_generator_and_without_either_the_result_repeats(glp):
    x, noise = rows(9), torch.randn(9, D, generator=generator(3))
    assert torch.equal(glp.encode(x, noise=noise, generator=generator(1)), glp.encode(x, noise=noise))
    assert torch.equal(glp.encode(x), glp.encode(x))
    assert not torch.equal(glp.encode(x, noise=noise), glp.encode(x))


def test_features_are_those_of_each_noise_level(glp):
    x = rows(9)
    assert glp.n_features == 2 * 64
    assert glp.encode(x).shape == (9, 128)
    noise = torch.randn(9, D, generator=generator(4))
    assert torch.equal(glp.encode(x, sigma=1, noise=noise), glp.encode(rows(9, seed=1), sigma=1, noise=noise))


def test_sigma_zero_is_the_identity(glp):
    x = rows(11)
    same = glp.project(x, sigma=0)
    assert torch.equal(same, x)
    assert same is not x
    assert torch.equal(glp.reconstruct(x, sigma=0.0), x)
    assert torch.equal(glp.encode(x, sigma=0, generator=generator(1)), glp.encode(x, sigma=0, generator=generator(2)))


def test_no_rows_give_no_rows(glp):
    assert glp.project(torch.empty(0, D)).shape == (0, D)
    assert glp.encode(torch.empty(0, D)).shape == (0, glp.n_features)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda g: g.project(rows(3), u=0.5, sigma=0.5), "not both"),
        (lambda g: g.project(rows(3), u=1.0), "u must be in"),
        (lambda g: g.project(rows(3), u=float("nan")), "u must be in"),
        (lambda g: g.project(rows(3), sigma=1.5), "sigma must be in"),
        (lambda g: g.project(rows(3), steps=0), "steps must be at least 1"),
        (lambda g: g.project(rows(3), solver="magic"), "solver must be one of euler, heun"),
        (lambda g: g.encode(rows(3), sigma=-0.1), "sigma must be in"),
        (lambda g: g.encode(rows(3), sigma=float("nan")), "sigma must be in"),
        (lambda g: g.encode(torch.zeros(3, D + 1)), r"shape \(n, 6\), got \(3, 7\)"),
        (lambda g: g.encode(rows(3), noise=torch.zeros(2, D)), r"noise of shape \(3, 6\)"),
        (lambda g: g.encode(rows(3) * float("inf")), "finite"),
        (lambda g: g.velocity(rows(3), 0.5, layer=0), "leave layer out"),
    ],
)
def test_bad_arguments_are_refused(glp, call, words):
    with pytest.raises(InputError, match=words):
        call(glp)


# -- saving and loading ----------------------------------------------------------------------------------------


def test_a_saved_prior_is_the_same(glp, tmp_path):
    glp.save_pretrained(tmp_path / "glp")
    x = rows(13)
    for again in (GLP.from_pretrained(tmp_path / "glp"), load(tmp_path / "glp")):
        assert torch.equal(again.encode(x), glp.encode(x))
        assert torch.equal(again.project(x, u=0.5), glp.project(x, u=0.5))
        assert again.history == glp.history
        assert again.provenance == glp.provenance
        assert again.hook == glp.hook


def edited(change):
    """A change to the denoiser's settings in config.yaml."""

    def apply(folder):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        change(config["glp_kwargs"]["denoiser_config"])
        (folder / "config.yaml").write_text(yaml.safe_dump(config))

    return apply


def written(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:200])


def statistics(value):
    return lambda folder: torch.save(value, folder / "rep_statistics.pt")


class Payload:
    """Unpickling it would write a file."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


DAMAGE = {
    "no weights": (lambda f: (f / "final.safetensors").unlink(), "checkpoint 'final' is not in"),
    "truncated weights": (cut("final.safetensors"), "truncated or no safetensors file"),
    "foreign weights": (written("final.safetensors", b"not weights"), "truncated or no safetensors file"),
    "tensors missing": (lambda f: save_file({"a": torch.zeros(2)}, f / "final.safetensors"), "do not fit the config"),
    "foreign yaml": (written("config.yaml", b"colour: red"), "not the config of a released GLP"),
    "yaml list": (written("config.yaml", b"- 1"), "not the config of a released GLP"),
    "broken yaml": (written("config.yaml", b"a: [1"), "config of a released GLP .* is not readable YAML"),
    "another width": (edited(lambda c: c.update(d_mlp=c["d_mlp"] + 1)), "do not fit the config"),
    "a block too many": (edited(lambda c: c.update(n_layers=c["n_layers"] + 1)), "do not fit the config"),
    "a width in words": (edited(lambda c: c.update(d_mlp="wide")), "d_mlp must be a positive integer"),
    "no width": (edited(lambda c: c.pop("d_mlp")), "do not fit the config"),
    "another d_input": (edited(lambda c: c.update(d_input=c["d_input"] + 1)), "shape|do not fit"),
    "no statistics": (lambda f: (f / "rep_statistics.pt").unlink(), r"rep_statistics\.pt is missing"),
    "truncated statistics": (cut("rep_statistics.pt"), "does not hold a mean and a var"),
    "foreign statistics": (written("rep_statistics.pt", b"zip"), "does not hold a mean and a var"),
    "statistics without var": (statistics({"mean": torch.zeros(3)}), "does not hold a mean and a var"),
    "statistics of another width": (
        statistics({"mean": torch.zeros(3), "var": torch.ones(3)}),
        "normaliser must have shape",
    ),
    "statistics with code": (statistics({"mean": Payload(), "var": Payload()}), "does not hold a mean and a var"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_released_checkpoints_are_refused_in_one_line(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "single_layer", tmp_path / "glp")
    change, words = DAMAGE[damage]
    change(tmp_path / "glp")
    with pytest.raises(InputError, match=words) as caught:
        GLP.from_pretrained(tmp_path / "glp")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("name", ["../single_layer/final", "/etc/passwd", "a/b", "..", "", "final.safetensors", "a b"])
def test_a_checkpoint_name_cannot_leave_the_folder(name):
    with pytest.raises(InputError, match="must be a plain name"):
        GLP.from_pretrained(GOLDEN / "single_layer", checkpoint=name)


def test_intermediate_checkpoints_are_found_and_unknown_ones_list_what_is_there(tmp_path):
    shutil.copytree(GOLDEN / "single_layer", tmp_path / "glp")
    (tmp_path / "glp" / "checkpoints").mkdir()
    weights = load_file(tmp_path / "glp" / "final.safetensors")
    save_file({k: v * 0.5 for k, v in weights.items()}, tmp_path / "glp" / "checkpoints" / "epoch_0003.safetensors")
    early, final = (GLP.from_pretrained(tmp_path / "glp", checkpoint=name) for name in ("epoch_0003", "final"))
    assert torch.equal(early.denoiser.in_proj.weight, final.denoiser.in_proj.weight * 0.5)
    with pytest.raises(InputError, match="there are .*epoch_0003.*final"):
        GLP.from_pretrained(tmp_path / "glp", checkpoint="epoch_0009")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "nowhere", "no-such-org/no-such-glp"])
def test_a_missing_model_is_told_in_one_line(name):
    with pytest.raises(InputError, match="does not exist|cannot be fetched|neither a folder") as caught:
        GLP.from_pretrained(name)
    assert "\n" not in str(caught.value)


def test_the_layer_of_a_multi_layer_prior():
    glp = GLP.from_pretrained(GOLDEN / "multi_layer")
    want = load_file(GOLDEN / "multi_layer" / "expected.safetensors")
    x, layer = want["activations"], want["layer_idx"]
    depth = len(glp.mean)
    for use in (glp.normalize, glp.denormalize, glp.encode, glp.project, glp.score):
        for wrong in (None, depth, -1, torch.full((len(x),), depth)):
            with pytest.raises(InputError, match=f"layer=0..{depth - 1}"):
                use(x, layer=wrong)
    with pytest.raises(InputError, match="layer"):
        glp.sample(3)
    with pytest.raises(InputError, match="layer must be in"):
        glp.velocity(x, 0.5, layer=depth)
    one = torch.full((len(x),), 1)
    torch.testing.assert_close(glp.encode(x, layer=1), glp.encode(x, layer=one))
    assert not torch.allclose(glp.encode(x, layer=layer), glp.encode(x, layer=1))


def test_the_layers_of_a_prior_without_hook_points_are_told_apart():
    """By their fingerprint, under which results are kept."""
    glp = GLP.from_pretrained(GOLDEN / "multi_layer")
    glp.provenance = {}
    one, other = glp.at(glp.layers[0]), glp.at(glp.layers[1])
    assert one.hook is other.hook is None
    assert one.fingerprint() == glp.at(glp.layers[0]).fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    "layer",
    [torch.tensor([1]), torch.tensor([0, 1, 1]), torch.zeros(200, dtype=torch.long), torch.zeros(7, 1).long(),
     torch.zeros(7), torch.ones(7, dtype=torch.bool), 1.5, "blocks.1.hook_resid_post"],
)  # fmt: skip
def test_layers_that_are_not_one_for_each_row_are_refused(layer):
    glp = GLP.from_pretrained(GOLDEN / "multi_layer")
    x = torch.randn(7, glp.d_in, generator=generator(0))
    calls = [
        lambda: glp.normalize(x, layer=layer), lambda: glp.velocity(x, 0.5, layer=layer),
        lambda: glp.encode(x, layer=layer), lambda: glp.project(x, layer=layer), lambda: glp.score(x, layer=layer),
        lambda: glp.log_density(x, steps=2, layer=layer), lambda: glp.sample(7, layer=layer),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(InputError, match="layer must be (an integer|a whole number).*, got") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sigma", [-0.1, 1.5, float("nan"), torch.tensor([0.5]), torch.full((8,), 0.5)])
def test_noise_levels_that_are_not_one_for_each_row_are_refused(sigma, glp):
    with pytest.raises(InputError, match="one number or one for each of 7 rows"):
        glp.velocity(rows(7), sigma)


def test_rows_that_cannot_be_are_refused(glp):
    with pytest.raises(InputError, match="torch.Tensor .*, got a ndarray"):
        glp.project(rows(7).numpy())
    with pytest.raises(InputError, match="at least 0, got -1"):
        glp.sample(-1)


def test_loading_draws_nothing_and_takes_no_memory_for_a_wrong_shape():
    before = torch.get_rng_state()
    glp = GLP.from_pretrained(GOLDEN / "single_layer")
    assert torch.equal(torch.get_rng_state(), before)
    shape, weights = glp.denoiser.config.to_json() | {"d_model": 40_000}, glp.denoiser.state_dict()
    with pytest.raises(InputError, match="weights do not fit the config .*size mismatch"):
        Denoiser.filled(shape, weights)


def test_a_view_that_is_moved_takes_the_prior_along():
    """They share the network, and each works where that is."""
    glp = GLP.from_pretrained(GOLDEN / "multi_layer")
    glp.at(1).to("meta")
    assert glp.device.type == "meta"


def test_rows_of_each_layer_keep_their_layer_in_small_batches(monkeypatch):
    glp = GLP.from_pretrained(GOLDEN / "multi_layer")
    want = load_file(GOLDEN / "multi_layer" / "expected.safetensors")
    x, layer = want["activations"], want["layer_idx"]
    whole = glp.project(x, layer=layer), glp.encode(x, layer=layer)
    monkeypatch.setattr(batching, "ROWS", 2)
    torch.testing.assert_close(glp.project(x, layer=layer), whole[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(glp.encode(x, layer=layer), whole[1], atol=1e-4, rtol=1e-4)


def test_training_leaves_the_global_generators_alone(tmp_path, monkeypatch):
    store = write_store(tmp_path / "s", torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), hook="h")
    reseeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    before = torch.get_rng_state()
    GLP.fit(store, TrainConfig(batch_size=16, rows=32), d_model=8, d_mlp=10, n_layers=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not reseeded


def test_the_normaliser_is_computed_once_for_a_device_and_moves_with_the_prior():
    normalizer = Normalizer(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 0.0, 9.0]))
    cpu = torch.device("cpu")
    with torch.inference_mode():
        mean, std = normalizer.statistics(None, cpu)
    assert std.tolist() == [2.0, 1.0, 3.0]  # what does not vary keeps its scale
    assert not std.is_inference()
    assert normalizer.statistics(None, cpu)[1] is std
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(normalizer.normalize(x), (x - mean) / std)
    torch.testing.assert_close(normalizer.denormalize(normalizer.normalize(x)), x)
    moved = normalizer.to("meta")
    assert moved.statistics(None, torch.device("meta"))[0].device.type == "meta"


def test_a_normaliser_of_several_layers_knows_which_it_has():
    mean = torch.stack([torch.zeros(3), torch.full((3,), torch.nan), torch.ones(3)])
    normalizer = Normalizer(mean, mean + 4)
    assert normalizer.layers == [0, 2]
    cpu = torch.device("cpu")
    each = normalizer.statistics(torch.tensor([2, 0]), cpu)[0]
    assert torch.equal(each, torch.stack([normalizer.statistics(layer, cpu)[0] for layer in (2, 0)]))
    for layer in (None, 3, -1, torch.tensor([0, 3])):
        with pytest.raises(InputError, match="pass layer=0..2, got"):
            normalizer.statistics(layer, cpu)
