"""Hook functions on plain tensors: what they edit, what they leave, what they give back."""

import pytest
import torch

from glp_lens import hooks
from glp_lens.errors import InputError
from glp_lens.interface import Projector


class Halve(Projector):
    """Stands in for a prior: halves every row."""

    hook = "blocks.0.hook_resid_post"
    max_norm = None

    def __init__(self, d_in=5, max_norm=None):
        self.d_in, self.max_norm = d_in, max_norm
        self.seen = []

    def project(self, x, *, noise=None, generator=None):
        self.seen.append(noise)
        return x / 2


def stream(batch=3, pos=4, d=5, dtype=torch.float32):
    return torch.arange(1, batch * pos * d + 1, dtype=torch.float32).reshape(batch, pos, d).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_last_edits_the_last_position_and_keeps_dtype_and_input(dtype):
    x = stream(dtype=dtype)
    before = x.clone()
    y = hooks.edit(lambda rows: -rows, "last")(x, hook=None)
    assert y.dtype == dtype
    assert torch.equal(y[:, :-1], x[:, :-1])
    assert torch.equal(y[:, -1], -x[:, -1])
    assert torch.equal(x, before)


def test_all_spares_the_attention_sink_of_a_prompt_but_not_a_decoding_step():
    negate = hooks.edit(lambda rows: -rows, "all")
    x = stream()
    y = negate(x)
    assert torch.equal(y[:, 0], x[:, 0])
    assert torch.equal(y[:, 1:], -x[:, 1:])
    one = stream(pos=1)
    assert torch.equal(negate(one), -one)


def test_projection_hook_names_its_hook_point_and_passes_massive_rows():
    x = stream()
    limit = float(x[1, -1].norm()) + 1e-3
    name, fn = Halve(max_norm=limit).projection_hook()
    y = fn(x, hook=None)
    assert name == "blocks.0.hook_resid_post"
    assert torch.equal(y[:2, -1], x[:2, -1] / 2)
    assert torch.equal(y[2], x[2])


def test_noise_is_asked_for_by_call_and_row_count():
    model = Halve()
    asked = []

    def noise(call, rows):
        asked.append((call, rows))
        return torch.full((rows, 5), float(call))

    fn = hooks.project(model, "last", noise)
    fn(stream())
    fn(stream(pos=1))
    assert asked == [(0, 3), (1, 3)]
    assert float(model.seen[1][0, 0]) == 1.0


def test_wrong_width_is_refused_with_both_widths():
    with pytest.raises(InputError, match="width 7, the hook point has width 5"):
        hooks.project(Halve(d_in=7))(stream())
    with pytest.raises(InputError, match="direction has width 4"):
        hooks.steer(torch.ones(4), 1.0)(stream())
    with pytest.raises(InputError, match="finite vector"):
        hooks.steer(torch.tensor([1.0, float("nan")]), 1.0)
    with pytest.raises(InputError, match="2 strengths for a batch of 3"):
        hooks.steer(torch.ones(5), torch.tensor([1.0, 2.0]))(stream())


def test_steering_adds_each_rows_own_strength_then_repairs_only_what_was_moved():
    x, w = stream(), torch.tensor([1.0, 0, 0, 0, 2.0])
    alpha = torch.tensor([0.0, 1.0, 10.0])
    plain = hooks.steer(w, alpha)(x)
    torch.testing.assert_close(plain[:, -1], x[:, -1] + alpha[:, None] * w)
    assert torch.equal(plain[:, :-1], x[:, :-1])
    repaired = hooks.steer(w, alpha, projector=Halve())(x)
    assert torch.equal(repaired[0], x[0])
    torch.testing.assert_close(repaired[1:, -1], plain[1:, -1] / 2)
    everywhere = hooks.steer(w, 1.0, positions="all")(x)
    assert torch.equal(everywhere[:, 0], x[:, 0])
    torch.testing.assert_close(everywhere[:, 1:], x[:, 1:] + w)


def test_replace_writes_only_where_the_mask_says():
    x = stream()
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1, 2] = True
    y = hooks.replace(torch.zeros_like(x), mask)(x)
    assert float(y[1, 2].abs().sum()) == 0
    y[1, 2] = x[1, 2]
    assert torch.equal(y, x)
