"""Repair of steered rows: closed forms with linear projectors, one noise for both halves, what strength 0 leaves."""

import pytest
import torch

import glp_lens as gl
from glp_lens import hooks
from glp_lens.errors import InputError
from glp_lens.interface import Projector
from tests.unit.memory_store import MemoryStore

pytestmark = pytest.mark.filterwarnings("ignore:the texts of a batch do not begin")  # random rows have no BOS
D, BATCH, POS = 6, 5, 4
HOOK = "blocks.1.hook_resid_post"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Noisy(Projector):
    """Adds the noise to rows, and keeps what it was called with."""

    hook, max_norm, d_in = HOOK, None, D

    def __init__(self, max_norm=None):
        self.calls, self.max_norm = [], max_norm

    def project(self, x, *, noise=None, generator=None, condition=None):
        noise = noise if noise is not None else torch.randn(len(x), D, generator=generator)
        self.calls.append((x.clone(), noise.clone(), condition))
        return 0.5 * x + noise


@pytest.fixture(scope="module")
def gaussian():
    return gl.Gaussian.fit(MemoryStore(normal(400, D, seed=1) @ normal(D, D, seed=2) + 3, HOOK))


def linear(gaussian, sigma):
    """`P(x) = A x + b` of a Gaussian, in float64, from its covariance alone."""
    std, vectors = gaussian.std.double(), gaussian.eigenvectors.double()
    covariance = vectors @ gaussian.eigenvalues.double().diag() @ vectors.T
    noise = (sigma / (1 - sigma)) ** 2 * torch.eye(D, dtype=torch.float64)
    a = std.diag() @ covariance @ torch.linalg.inv(covariance + noise) @ (1 / std).diag()
    return a, gaussian.mean.double() - a @ gaussian.mean.double()


@pytest.mark.parametrize("sigma", [0.0, 0.4])
def test_the_three_repairs_of_a_linear_projector_have_closed_forms(gaussian, sigma):
    x, w = 3 + normal(BATCH, POS, D, seed=3), normal(D, seed=4)
    alpha = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0])
    a, b = linear(gaussian, sigma)
    rows, moved = x[:, -1].double(), x[:, -1].double() + alpha[:, None] * w
    unit = (w / w.norm()).double()
    correction = moved @ a.T + b - moved
    want = {
        "project": moved @ a.T + b,
        "difference": rows + alpha[:, None] * (a @ w.double()),
        "orthogonal": moved + correction - (correction @ unit)[:, None] * unit,
    }
    for repair, rows_wanted in want.items():
        y = hooks.steer(w, alpha, gaussian, repair=repair, sigma=sigma)(x)
        steered = alpha != 0
        torch.testing.assert_close(y[steered, -1].double(), rows_wanted[steered], rtol=1e-4, atol=1e-4)
        assert torch.equal(y[3], x[3])
        assert torch.equal(y[:, :-1], x[:, :-1])


def test_an_orthogonal_repair_keeps_the_coordinates_along_several_directions(gaussian):
    x, w = 3 + normal(BATCH, POS, D, seed=3), normal(2, D, seed=4)
    strength = torch.tensor([1.5, -0.5])
    plain = hooks.steer(w, strength)(x)[:, -1]
    repaired = hooks.steer(w, strength, gaussian, repair="orthogonal", sigma=0.5)(x)[:, -1]
    torch.testing.assert_close(plain @ w.T, repaired @ w.T, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, repaired, atol=0.1)
    projected = hooks.project(gaussian, repair="orthogonal", direction=w, sigma=0.5)(
        hooks.steer(w, strength)(x)
    )  # steering, then the projection as a hook of its own
    torch.testing.assert_close(projected[:, -1], repaired)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_difference_of_strength_zero_is_the_identity_bit_for_bit(gaussian, dtype):
    x = (3 + normal(BATCH, POS, D)).to(dtype)
    for projector in (gaussian, Noisy()):
        for strength in (0.0, torch.zeros(BATCH)):
            y = hooks.steer(torch.ones(D), strength, projector, "all", repair="difference")(x)
            assert torch.equal(y, x)
            assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("noise", [None, "seeded"])
def test_a_difference_projects_once_with_one_noise_for_both_halves(noise):
    x, w, projector = normal(BATCH, POS, D), normal(D, seed=2), Noisy()
    noise = None if noise is None else hooks.SeededNoise(0, range(BATCH))
    y = hooks.steer(w, 2.0, projector, noise=noise, repair="difference")(x)
    ((rows, drawn, _),) = projector.calls
    assert rows.shape == (2 * BATCH, D)
    torch.testing.assert_close(rows[:BATCH], x[:, -1] + 2 * w)
    assert torch.equal(rows[BATCH:], x[:, -1])
    assert torch.equal(drawn[:BATCH], drawn[BATCH:])
    assert drawn[:BATCH].unique(dim=0).shape == (BATCH, D)
    torch.testing.assert_close(y[:, -1], x[:, -1] + w)


def test_noise_of_a_row_depends_on_seed_key_and_position_in_its_text_only():
    x = normal(3, 7, D)
    lengths = [7, 4, 2]
    left = torch.tensor([[0] * (7 - n) + [1] * n for n in lengths])
    right = torch.tensor([[1] * n + [0] * (7 - n) for n in lengths])
    keys = ["a", "b", 3]
    alone = []
    for key, n in zip(keys, lengths, strict=True):
        projector = Noisy()
        fn = hooks.steer(torch.ones(D), 1.0, projector, "all", hooks.SeededNoise(5, [key]))
        fn(x[:1, :n])
        fn(x[:1, :1])  # a generated token
        alone.append(torch.cat([noise for _, noise, _ in projector.calls]))
    for mask in (left, right):
        projector, order = Noisy(), [2, 0, 1]
        noise = hooks.SeededNoise(5, [keys[i] for i in order])
        fn = hooks.steer(torch.ones(D), torch.tensor([1.0, 0.0, 2.0]), projector, "all", noise, mask[order])
        fn(x)
        fn(x[:, :1])
        prompt, step = (noise for _, noise, _ in projector.calls)
        assert torch.equal(prompt, torch.cat([alone[2][:-1], alone[1][:-1]]))  # the text of strength 0 needs none
        assert torch.equal(step, torch.stack([alone[2][-1], alone[1][-1]]))
    drawn = torch.cat(alone)
    assert len(drawn.unique(dim=0)) == len(drawn)
    first = torch.zeros(1, dtype=torch.long)
    draws = [hooks.SeededNoise(seed, [key])(first, first, D) for seed in (0, 1, -1) for key in (7, "7", -7)]
    assert len(torch.cat(draws).unique(dim=0)) == len(draws)
    many = hooks.SeededNoise(0, range(2000))(torch.arange(2000), torch.arange(2000), D)
    assert abs(float(many.mean())) < 0.03
    assert abs(float(many.std()) - 1) < 0.03


def test_keys_that_are_not_those_of_the_batch_are_refused():
    with pytest.raises(InputError, match="2 keys of noise for a batch of 5"):
        hooks.steer(torch.ones(D), 1.0, Noisy(), noise=hooks.SeededNoise(0, ["a", "b"]))(normal(BATCH, POS, D))
    with pytest.raises(InputError, match="integers or strings"):
        hooks.SeededNoise(0, [1.5])


@pytest.mark.parametrize(("stream", "given"), [(torch.bfloat16, torch.bfloat16), (torch.float32, None)])
@pytest.mark.parametrize("repair", ["project", "difference"])
def test_a_stream_in_bfloat16_is_repaired_in_bfloat16_where_the_projector_can(stream, given, repair):
    class Either(Noisy):
        takes_dtype, seen = True, []

        def project(self, x, *, dtype=None, **options):
            self.seen.append(dtype)
            return super().project(x, **options)

    projector, x = Either(), normal(BATCH, POS, D).to(stream)
    hooks.steer(normal(D), 1.0, projector, repair=repair)(x, hook=None)
    hooks.steer(normal(D), 1.0, projector, repair=repair, dtype=torch.float32)(x, hook=None)
    assert projector.seen == [given, torch.float32]


def test_massive_rows_are_edited_but_not_repaired():
    x = normal(BATCH, POS, D)
    x[1] *= 100
    w = torch.ones(D)
    for repair in ("project", "difference", "orthogonal"):
        y = hooks.steer(w, 1.0, Noisy(max_norm=50.0), repair=repair, renormalize="before")(x)
        torch.testing.assert_close(y[1, -1], x[1, -1] + w)
        assert not torch.allclose(y[0, -1], x[0, -1] + w)


def test_each_text_has_its_own_condition():
    x, condition = normal(BATCH, POS, D), normal(BATCH, 3, seed=1)
    for repair, copies in (("project", 1), ("difference", 2)):
        projector = Noisy()
        strength = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
        hooks.steer(torch.ones(D), strength, projector, "all", repair=repair, condition=condition,
                    mask=torch.ones(BATCH, POS))(x)  # fmt: skip
        want = condition[strength != 0].repeat_interleave(POS - 1, 0).repeat(copies, 1)
        assert torch.equal(projector.calls[0][2], want)


@pytest.mark.parametrize("n", [1, BATCH - 1, BATCH + 1])
def test_conditions_of_another_batch_are_refused(n):
    with pytest.raises(InputError, match=f"condition of {n} texts for a batch of {BATCH}"):
        hooks.steer(torch.ones(D), 1.0, Noisy(), condition=normal(n, 3))(normal(BATCH, POS, D))


@pytest.mark.parametrize("repair", ["project", "difference"])
def test_no_generator_is_the_default_one(repair):
    x = normal(BATCH, POS, D)
    given, default = (
        hooks.steer(torch.ones(D), 1.0, Noisy(), repair=repair, **options)(x) for options in ({"generator": None}, {})
    )
    assert torch.equal(given, default)


def test_renormalising_keeps_the_norm_about_the_centre_or_caps_it():
    x, w, centre = normal(BATCH, POS, D), 4 * normal(D, seed=2), normal(D, seed=3).double()
    alpha = torch.tensor([1.0, 0.1, 0.0, -1.0, 2.0])
    about = lambda rows: (rows - centre).norm(dim=1)  # noqa: E731
    plain, kept = hooks.steer(w, alpha)(x)[:, -1], hooks.steer(w, alpha, renormalize="before", centre=centre)(x)[:, -1]
    torch.testing.assert_close(about(kept), about(x[:, -1]))
    torch.testing.assert_close((kept - centre) / about(kept)[:, None], (plain - centre) / about(plain)[:, None])
    limit = float(about(plain).median())
    capped = hooks.steer(w, alpha, renormalize=limit, centre=centre)(x)[:, -1]
    short = about(plain) <= limit
    assert 0 < int(short.sum()) < BATCH
    assert torch.equal(capped[short], plain[short])
    torch.testing.assert_close(about(capped[~short]), torch.full((int((~short).sum()),), limit, dtype=torch.float64))
    untouched = hooks.steer(w, alpha, renormalize=1e-3, centre=centre)(x)
    assert torch.equal(untouched[2], x[2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"operation": "push"}, "operation must be one of add, ablate, clamp, rotate"),
        ({"repair": "denoise"}, "repair must be one of project, difference, orthogonal"),
        ({"renormalize": "after"}, "renormalize must be"),
        ({"renormalize": 0.0}, "renormalize must be"),
        ({"centre": torch.ones(D + 1)}, "centre must be a finite vector"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(options, words):
    with pytest.raises(InputError, match=words):
        hooks.steer(torch.ones(D), 1.0, **options)


def test_a_projection_hook_refuses_a_difference():
    with pytest.raises(InputError, match="hooks.steer"):
        Noisy().projection_hook(repair="difference")
    with pytest.raises(InputError, match="go together"):
        Noisy().projection_hook(repair="orthogonal")


def test_options_of_a_repair_without_a_projector_are_refused():
    """Else someone who forgets the projector takes plain steering for a repair."""
    with pytest.raises(InputError, match="sigma are of a repair: pass projector="):
        hooks.steer(torch.ones(D), 1.0, repair="difference", sigma=0.6)
