"""Edits along directions, each beside its closed form in float64."""

import math

import pytest
import torch

from glp_lens import hooks
from glp_lens.errors import InputError

D, BATCH, POS = 7, 5, 3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, CENTRE, PAIR = normal(BATCH, POS, D), 3 * normal(D, seed=1), normal(2, D, seed=2)
"""Rows, a centre, and two directions that are neither orthogonal nor of one length."""


def edited(direction, strength, operation, centre=CENTRE, **options):
    """The rows at the last position before and after, less the centre, in float64."""
    fn = hooks.steer(direction, strength, operation=operation, centre=centre, **options)
    y = fn(X.float())
    assert torch.equal(y[:, :-1], X.float()[:, :-1])
    c = 0 if centre is None else centre
    return X[:, -1] - c, y[:, -1].double() - c


def coordinates(rows, directions=PAIR):
    return torch.linalg.lstsq(directions.T, rows.T).solution.T


def outside(rows, directions=PAIR):
    return rows - coordinates(rows, directions) @ directions


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strength", [0.7, [0.7, -2.0], [[0.1 * i, 1.0 - i] for i in range(BATCH)]])
def test_strengths_of_several_directions_are_one_one_each_or_for_each_text_too(strength):
    strength = torch.tensor(strength, dtype=torch.float64)
    alpha = strength.expand(BATCH, 2)
    before, after = edited(PAIR, strength, "add")
    close(after - before, alpha @ PAIR)
    before, after = edited(PAIR, strength, "ablate")
    close(coordinates(after), (1 - alpha) * coordinates(before))
    close(outside(after), outside(before))
    before, after = edited(PAIR, strength, "clamp")
    close(coordinates(after), alpha)
    close(outside(after), outside(before))


@pytest.mark.parametrize("centre", [None, CENTRE])
def test_ablation_removes_all_that_lies_in_the_span(centre):
    before, after = edited(PAIR, 1.0, "ablate", centre)
    close(after @ PAIR.T, torch.zeros(BATCH, 2, dtype=torch.float64))
    close(after, outside(before))
    _, reflected = edited(PAIR[0], 2.0, "ablate", centre)
    unit = PAIR[0] / PAIR[0].norm()
    close(reflected, before - 2 * (before @ unit)[:, None] * unit)
    _, cleared = edited(PAIR, 0.0, "clamp", centre)  # of which strength 0 is an edit too
    close(cleared, outside(before))


def test_one_direction_and_a_strength_for_each_text():
    alpha = torch.linspace(-1, 2, BATCH, dtype=torch.float64)
    length = (PAIR[0] ** 2).sum()
    for direction in (PAIR[0], PAIR[:1]):
        before, after = edited(direction, alpha, "clamp")
        close(after @ PAIR[0] / length, alpha)
        before, after = edited(direction, alpha, "ablate")
        close(after @ PAIR[0], (1 - alpha) * (before @ PAIR[0]))


@pytest.mark.parametrize("angle", [0.4, -2.0, 7.0])
def test_rotation_in_a_plane_turns_from_the_first_direction_towards_the_second(angle):
    before, after = edited(PAIR, angle, "rotate")
    close(after.norm(dim=1), before.norm(dim=1))
    close(outside(after), outside(before))
    first = PAIR[0] / PAIR[0].norm()
    second = outside(PAIR[1][None], PAIR[:1])[0]
    second = second / second.norm()
    points = [torch.view_as_complex(torch.stack([rows @ first, rows @ second], 1)) for rows in (before, after)]
    close(points[1], points[0] * torch.polar(torch.tensor(1.0), torch.tensor(angle)))


def test_rotation_towards_one_direction_stops_there():
    unit = PAIR[0] / PAIR[0].norm()
    angle = lambda rows: torch.arccos(rows @ unit / rows.norm(dim=1))  # noqa: E731
    theta = torch.tensor([0.3, 0.0, 9.0, -0.2, -9.0], dtype=torch.float64)
    before, after = edited(3 * PAIR[0], theta, "rotate")
    close(after.norm(dim=1), before.norm(dim=1))
    want = (angle(before) - theta).clamp(0, math.pi)
    torch.testing.assert_close(angle(after), want, rtol=1e-3, atol=1e-3)
    close(after[2], before[2].norm() * unit)
    close(after[4], -before[4].norm() * unit)
    plane = torch.stack([unit, before[0]])  # a row stays in its plane with the direction
    close(outside(after[:1], plane), torch.zeros(1, D, dtype=torch.float64))
    along = hooks.steer(torch.tensor([2.0, 0.0]), -1.0, operation="rotate")
    for row in ([3.0, 0.0], [-3.0, 0.0], [0.0, 0.0]):
        assert along(torch.tensor([[row]])).flatten().tolist() == row


@pytest.mark.parametrize("operation", ["add", "ablate", "rotate"])
def test_strength_zero_is_the_identity_bit_for_bit(operation):
    x = X.float()
    for direction, strength in ((PAIR, 0.0), (PAIR[0], torch.zeros(BATCH))):
        y = hooks.steer(direction, strength, positions="all", operation=operation, centre=CENTRE,
                        renormalize="before", mask=torch.ones(BATCH, POS))(x)  # fmt: skip
        assert torch.equal(y, x)


@pytest.mark.parametrize("operation", ["add", "ablate", "clamp", "rotate"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_input_are_kept_and_modes_of_the_caller_change_nothing(operation, dtype):
    x = X.to(dtype)
    copy = x.clone()
    fn = lambda: hooks.steer(PAIR, 0.5, operation=operation)(x)  # noqa: E731
    y = fn()
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert torch.equal(x, copy)
    for mode in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.no_grad()):
        with mode:
            assert torch.equal(fn(), y)


def test_gradients_flow_through_an_edit():
    x = X.float().requires_grad_()
    hooks.steer(PAIR, 1.0, operation="ablate")(x)[:, -1].sum().backward()
    projection = torch.eye(D, dtype=torch.float64) - torch.linalg.pinv(PAIR) @ PAIR
    close(x.grad[:, -1].double(), projection.sum(0).expand(BATCH, D))


@pytest.mark.parametrize(
    ("direction", "strength", "operation", "words"),
    [
        (torch.stack([PAIR[0], 2 * PAIR[0]]), 1.0, "clamp", "linearly independent"),
        (torch.zeros(D), 1.0, "ablate", "linearly independent"),
        (normal(3, D), 1.0, "rotate", "plane of two directions or towards one, got 3"),
        (PAIR, torch.ones(3), "add", r"\(2,\) or \(batch, 2\)"),
        (PAIR, torch.ones(BATCH, 2), "rotate", r"\(batch,\)"),
        (PAIR[None], 1.0, "add", "finite vector"),
        (PAIR[0], math.inf, "add", "strength must be a finite number"),
    ],
)
def test_directions_and_strengths_that_do_not_fit_are_refused(direction, strength, operation, words):
    with pytest.raises(InputError, match=words) as error:
        hooks.steer(direction, strength, operation=operation)
    assert "\n" not in str(error.value)


def test_another_batch_than_the_strengths_are_for_is_refused():
    for direction, strength in ((PAIR, torch.ones(4, 2)), (PAIR, torch.ones(1, 2)), (PAIR[0], torch.ones(1))):
        with pytest.raises(InputError, match=f"got {len(strength)} strengths for a batch of {BATCH}"):
            hooks.steer(direction, strength)(X.float())
