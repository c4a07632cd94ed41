"""What features write: directions, the logit lens and the effects of meta-neurons, against definitions in float64."""

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from glp_lens import GLP, PCA, SAE, Gaussian, Raw, lm
from glp_lens.activations.writer import write_store
from glp_lens.features import About, FeatureFolder, ModelAbout
from glp_lens.features.describe import describe
from glp_lens.features.directions import NONE, class_means, learned, top_rows
from glp_lens.features.lens import Lens
from glp_lens.features.prior_effects import prior_effects, stability
from glp_lens.features.sample import Sample, blocks, encode, noise
from glp_lens.models.denoiser import Denoiser, DenoiserConfig, sinusoidal
from glp_lens.models.neurons import Neurons
from glp_lens.models.random_features import RandomFeatures

D, D_MODEL, D_MLP, BLOCKS = 5, 8, 11, 3


def sample(n, d=D, seed=0):
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.normal(2, 3, (n, d)) * np.linspace(0.5, 4, d)).float()
    keys = rng.integers(1 << 63, size=n).astype(np.uint64)
    return Sample(rows, keys, rng.integers(1, 60, n), rng.integers(0, 99, n))


def prior(depth=None, seed=0):
    """A GLP of random weights, none of them small, and statistics that differ between dimensions and layers."""
    generator = torch.Generator().manual_seed(seed)
    denoiser = Denoiser(DenoiserConfig(D, D_MODEL, D_MLP, BLOCKS, depth))
    with torch.no_grad():
        for p in denoiser.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.4 if p.ndim == 2 else 1))
    shape = (D,) if depth is None else (depth, D)
    mean, var = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) * 9 + 1
    glp = GLP(denoiser, mean, var)
    return glp if depth is None else glp.at(1)


def velocity(glp, z, sigma, change=None):
    """The velocity at one row, and its units, in float64: `change(b, hidden)` edits the units of block b."""
    net = glp.denoiser
    w = {name: p.double() for name, p in net.state_dict().items()}

    def affine(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def embedded(name, position):
        e = sinusoidal(torch.tensor([position]), D_MODEL).double()[0]
        return affine(f"{name}.2", silu(affine(f"{name}.0", e)))

    e = embedded("time_embed", 1000 * sigma)
    if glp.layer is not None:
        e = e + embedded("layer_embed", glp.layer / (net.config.multi_layer_n_layers - 1))
    h, units = affine("in_proj", z), []
    for b in range(BLOCKS):
        x, at = norm(f"layers.{b}.ln", h), f"layers.{b}"
        hidden = silu(affine(f"{at}.gate_proj", x) * affine(f"{at}.time_proj", e)) * affine(f"{at}.up_proj", x)
        units.append(hidden)
        h = h + affine(f"{at}.down_proj", hidden if change is None else change(b, hidden))
    return affine("out_proj", norm("ln", h)), torch.cat(units)


def edited(unit, edit):
    def change(b, hidden):
        one = torch.zeros(D_MLP, dtype=torch.float64)
        one[unit % D_MLP] = 1
        return edit(hidden, one) if b == unit // D_MLP else hidden

    return change


@pytest.mark.parametrize("depth", [None, 4])
def test_what_units_write_is_the_derivative_of_the_denoised_activation(depth, monkeypatch):
    """And the change without them is exact. Chunks are smaller than rows and pairs."""
    monkeypatch.setattr("glp_lens.features.prior_effects._ROWS", 7)
    glp, rows, seed = prior(depth), sample(23), 5
    top = torch.randint(23, (BLOCKS * D_MLP, 9), generator=torch.Generator().manual_seed(1))
    top[3, 4:], top[17] = NONE, NONE
    table, directions = prior_effects(glp, rows, top, 0.1, sigmas=(0.4,), seed=seed)
    eps = noise(rows.keys, rows.positions, D, seed + 1).double()
    mean, std = (s.double() for s in glp.statistics(None, torch.device("cpu")))
    assert directions[17].isnan().all()
    assert sorted(set(table["feature"])) == [u for u in range(BLOCKS * D_MLP) if u != 17]
    for unit in (0, 3, 12, 21, 32):
        own = [r for r in top[unit, :8].tolist() if r != NONE]
        assert len(own) == (4 if unit == 3 else 8)
        at_features = None
        for sigma in (0.1, 0.4):
            jacobians, values, changes = [], [], []
            for r in own:
                z = (1 - sigma) * (rows.rows[r].double() - mean) / std + sigma * eps[r]

                def of_unit(t, z=z, sigma=sigma, unit=unit):
                    return velocity(glp, z, sigma, edited(unit, lambda hidden, one: hidden + t * one))[0]

                zero = torch.zeros((), dtype=torch.float64)
                jacobians.append(-torch.autograd.functional.jacobian(of_unit, zero) * std)
                v, units = velocity(glp, z, sigma)
                without, _ = velocity(glp, z, sigma, edited(unit, lambda hidden, one: hidden * (1 - one)))
                values.append(units[unit])
                changes.append((v - without).norm() / v.norm())
                step = of_unit(zero + 1e-5) - of_unit(zero - 1e-5)  # a second truth: finite differences
                torch.testing.assert_close(jacobians[-1], -step / 2e-5 * std, rtol=1e-4, atol=1e-6)
            jacobian = torch.stack(jacobians).mean(0)
            if at_features is None:
                at_features = jacobian
                torch.testing.assert_close(directions[unit].double(), jacobian, rtol=1e-3, atol=1e-4)
            (found,) = table[(table["feature"] == unit) & (table["sigma"] == sigma)].to_dict("records")
            expected = {
                "top_value": torch.stack(values).mean(),
                "ablation": torch.stack(changes).mean(),
                "jacobian_norm": jacobian.norm(),
                "jacobian_agreement": jacobian.norm() / torch.stack(jacobians).norm(dim=1).mean(),
                "jacobian_cosine": torch.cosine_similarity(jacobian, at_features, dim=0),
            }
            for name, value in expected.items():
                assert found[name] == pytest.approx(float(value), rel=1e-3, abs=1e-5), (unit, sigma, name)


def test_stability_is_the_intraclass_correlation_of_two_noise_seeds():
    glp, rows = prior(), sample(601)
    found = stability(glp, rows, 0.3, seed=2).double().numpy()
    both = np.stack(
        [glp.encode(rows.rows, sigma=0.3, noise=noise(rows.keys, rows.positions, D, s)).double() for s in (2, 3)]
    )
    n = len(rows)
    for unit in (0, 20, 32):  # the textbook's analysis of variance
        a = both[:, :, unit]
        between = 2 * np.sum((a.mean(0) - a.mean()) ** 2) / (n - 1)
        within = np.sum((a - a.mean(0)) ** 2) / n
        assert found[unit] == pytest.approx((between - within) / (between + within), rel=1e-4)
    assert stability(glp, rows, 0.0).numpy() == pytest.approx(1)
    assert np.abs(stability(glp, rows, 1.0).numpy()).max() < 5 / np.sqrt(n)


def test_top_rows_are_the_largest_and_only_those_in_which_a_feature_is_on():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(907, 6)).astype(np.float32)
    values[:, 1] = np.maximum(values[:, 1], 0)
    values[:, 2] = 0
    values[[4, 500, 903], 2] = [1, 3, 2]
    values[:, 3] = 7
    parts = [(slice(i, min(i + 100, 907)), torch.from_numpy(values[i : i + 100])) for i in range(0, 907, 100)]
    for signed in (False, True):
        top = top_rows(parts, 907, 6, signed=signed).numpy()
        assert top.shape == (6, 10)  # one in a hundred
        for j in (0, 1, 4, 5):
            assert top[j].tolist() == np.argsort(-values[:, j])[:10].tolist()
        assert (top[3] == NONE).all()
    assert top_rows(parts, 907, 6, signed=False)[2].tolist() == [500, 903, 4] + [NONE] * 7
    assert top_rows(parts[:1], 100, 6, signed=True).shape == (6, 8)


def test_class_means_are_means_of_top_rows_less_that_of_all():
    rows = sample(40).rows
    top = torch.tensor([[3, 7, 9], [1, NONE, NONE], [NONE] * 3])
    found = class_means(rows, top)
    torch.testing.assert_close(found[0], rows[[3, 7, 9]].mean(0) - rows.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], rows[1] - rows.mean(0), rtol=1e-4, atol=1e-4)
    assert found[2].isnan().all()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "acts", sample(700).rows, hook="blocks.1.hook_resid_post")


@pytest.mark.parametrize(
    "fit",
    [
        PCA.fit,
        lambda store: PCA.fit(store, n_components=3, standardize=False),
        Gaussian.fit,
        lambda store: Gaussian.fit(store, diagonal=True),
        lambda store: Raw.fit(store, n_rows=20),
    ],
)
def test_a_component_changes_its_own_feature_by_one(store, fit):
    model = fit(store)
    _, vectors = learned(model, None)
    x = sample(1, seed=3).rows
    change = model.encode(x + vectors) - model.encode(x)
    torch.testing.assert_close(change, torch.eye(model.n_features), rtol=1e-3, atol=1e-3)


def test_a_random_feature_has_the_change_along_its_weights(store):
    model = RandomFeatures.fit(store, n_features=9)
    way, vectors = learned(model, None)
    assert way == "input weights"
    z = (vectors @ torch.diag(1 / model.std)).double()
    torch.testing.assert_close(z, model.weights.double(), rtol=1e-5, atol=1e-5)
    on = (model.mean + 3 * vectors)[:, None]  # far enough along each that it is on
    for i, (x, vector) in enumerate(zip(on, vectors, strict=True)):
        assert float(model.encode(x + vector)[0, i] - model.encode(x)[0, i]) == pytest.approx(1, rel=1e-3)


def test_an_autoencoder_adds_its_decoder_row(store):
    model = SAE.fit(store, n_latents=13, k=3, rows=400, batch_size=50)
    way, vectors = learned(model, None)
    assert way == "decoder"
    added = model.decode(2.5 * torch.eye(13)) - model.decode(torch.zeros(1, 13))
    torch.testing.assert_close(added, 2.5 * vectors, rtol=1e-4, atol=1e-4)


def test_a_prior_consists_of_no_directions_and_neurons_need_their_language_model(tiny_model):
    assert learned(prior(), None) is None
    neurons = Neurons.of(tiny_model, "blocks.1.hook_resid_post")
    assert learned(neurons, None) is None
    way, vectors = learned(neurons, tiny_model)
    tokens = torch.tensor([[0, 9, 5, 31, 7]])
    mask = torch.ones_like(tokens).bool()
    found = lm.activations(tiny_model, tokens, mask, [neurons.hook, "blocks.1.hook_mlp_out"])
    assert way == "output weights"
    torch.testing.assert_close(
        found[neurons.hook][0] @ vectors, found["blocks.1.hook_mlp_out"][0], rtol=1e-3, atol=1e-4
    )


def logits_of(model, rows):
    """The model's own logits where the residual stream after the last block is these rows."""

    def put(stream, hook):
        return rows[None].to(stream.dtype)

    hook = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    tokens = torch.zeros(1, len(rows), dtype=torch.long)
    with torch.no_grad(), model.hooks(fwd_hooks=[(hook, put)]):
        return model(tokens, return_type="logits")[0]


def test_the_lens_is_the_end_of_the_language_model(tiny_model):
    """For a stream that is the direction alone, whatever the direction's length."""
    vectors = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    found = Lens(tiny_model).logits(vectors * torch.logspace(-20, 5, 6)[:, None])
    expected = logits_of(tiny_model, 1000 * vectors)  # where the norm's epsilon does not count
    torch.testing.assert_close(found, expected - expected.mean(1, keepdim=True), rtol=1e-3, atol=1e-4)


def test_biases_of_norm_and_unembedding_are_no_direction_s(open_layernorm):
    model = open_layernorm()
    generator = torch.Generator().manual_seed(1)
    for p in (model.ln_final.w, model.ln_final.b, model.unembed.b_U):
        p.data = torch.randn(p.shape, generator=generator)
    vectors = torch.randn(6, 24, generator=generator)
    found = Lens(model).logits(vectors)
    expected = logits_of(model, 1000 * vectors) - logits_of(model, 0 * vectors)
    torch.testing.assert_close(found, expected - expected.mean(1, keepdim=True), rtol=1e-3, atol=1e-3)


def test_rows_name_the_tokens_at_both_ends(tiny_bridge):
    vectors = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    vectors[3] = float("nan")
    rows = Lens(tiny_bridge).rows("decoder", vectors, k=4)
    assert [row[:3] for row in rows] == [(f, "decoder", side) for f in (0, 1, 2, 4) for side in ("top", "bottom")]
    logits = logits_of(tiny_bridge, 1000 * vectors[:1])[0]
    names = [tiny_bridge.tokenizer.decode([i]) for i in logits.argsort(descending=True).tolist()]
    assert rows[0][3] == names[:4]
    assert rows[1][3] == names[::-1][:4]
    assert rows[0][4][0] == pytest.approx(float(logits.max() - logits.mean()), rel=1e-3)


def test_describe_writes_what_the_format_promises(tiny_bridge, tmp_path):
    """Of a prior, of neurons, and of a model of another place than the residual stream."""
    hook, rows = "blocks.1.hook_resid_post", sample(60, 24)
    net = Denoiser(DenoiserConfig(24, D_MODEL, D_MLP, 2))
    with torch.no_grad():
        net.layers[0].up_proj.weight[4] = net.layers[0].up_proj.bias[4] = 0  # a dead unit
    glp = GLP(net, torch.zeros(24), torch.ones(24))
    neurons = Neurons.of(tiny_bridge, hook)
    inside = Sample(sample(60, 40).rows.relu(), rows.keys, rows.positions, rows.token_ids)
    samples = {hook: rows, neurons.hook: inside}
    models = [
        (ModelAbout("glp", "glp", "glp", hook, 2 * D_MLP, 2, True, 0.1), glp),
        (ModelAbout("mlp", "mlp", "neurons", neurons.hook, 40, 1, False), neurons),
        (ModelAbout("pca", "pca", "pca", neurons.hook, 40, 1, True), Raw(inside.rows)),
    ]
    folder = FeatureFolder(tmp_path / "features")
    notes = [describe(folder, about, model, samples, tiny_bridge) for about, model in models]
    folder.finish(About(tuple(about for about, _ in models), {}, 60, 60, "", {}, {}))
    folder = FeatureFolder.open(folder.path)
    assert [folder.ways(about.label) for about, _ in models] == [
        ["jacobian", "class mean"], ["output weights", "class mean"], ["decoder", "class mean"]
    ]  # fmt: skip
    assert [len(each) for each in notes] == [0, 0, 1]
    assert "not in the residual stream" in notes[2][0]
    assert not folder.has("pca", "writes")
    assert folder.table("glp", "prior")["sigma"].drop_duplicates().tolist() == [0.05, 0.1, 0.3, 0.6]
    for way in ("jacobian", "class mean"):
        assert folder.directions("glp", way)[0].isnan().any(1).nonzero().flatten().tolist() == [4]
    assert 4 not in set(folder.table("glp", "writes")["feature"]) | set(folder.table("glp", "prior")["feature"])
    assert len(folder.table("glp", "writes")) == 21 * 2 * 2
    features = encode(neurons, {}, inside, 0)
    best = features[:, 7].topk(8).indices
    expected = rows.rows[best].mean(0) - rows.rows.mean(0)
    vectors, norms = folder.directions("mlp", "class mean")
    torch.testing.assert_close(vectors[7] * norms[7], expected, rtol=1e-3, atol=1e-3)


def test_without_a_language_model_there_are_directions_and_no_tokens(tmp_path):
    rows = sample(30)
    about = ModelAbout("glp", "glp", "glp", "blocks.1.hook_resid_post", BLOCKS * D_MLP, BLOCKS, True, 0.1)
    folder = FeatureFolder(tmp_path)
    (note,) = describe(folder, about, prior(), {about.hook: rows}, None, sigmas=(0.1,))
    assert "language model" in note
    assert folder.ways(about) == ["jacobian", "class mean"]
    assert not folder.has(about, "writes")


def test_the_sample_is_encoded_in_blocks_with_the_same_noise():
    """What `describe` reads is what `encode` gives."""
    glp, rows = prior(), sample(30)
    parts = torch.cat([block for _, block in blocks(glp, {"sigma": 0.1}, rows, 3, rows=7)])
    torch.testing.assert_close(parts, encode(glp, {"sigma": 0.1}, rows, 3))
