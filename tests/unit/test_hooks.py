"""Hook functions on plain tensors: what they edit, what they leave, what they give back."""

import warnings

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


def test_noise_is_asked_for_by_text_and_position():
    model = Halve()
    asked = []

    def noise(texts, positions, width):
        asked.append((texts.tolist(), positions.tolist(), width))
        return torch.full((len(texts), width), float(len(asked)))

    fn = hooks.project(model, "last", noise, torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]))
    fn(stream())
    fn(stream(pos=1))
    assert asked == [([0, 1, 2], [2, 1, 3], 5), ([0, 1, 2], [3, 2, 4], 5)]
    assert float(model.seen[1][0, 0]) == 2.0


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


def test_a_mask_says_which_positions_are_tokens():
    x = stream(batch=2, pos=4)
    mask = torch.tensor([[False, False, True, True], [True, True, True, False]])  # padded left, and right
    everywhere = hooks.edit(lambda rows: -rows, "all", mask)(x)
    last = hooks.edit(lambda rows: -rows, "last", mask)(x)
    edited = [[(0, 3), (1, 1), (1, 2)], [(0, 3), (1, 2)]]
    for y, places in zip((everywhere, last), edited, strict=True):
        want = x.clone()
        for place in places:
            want[place] = -x[place]
        assert torch.equal(y, want)
    strengths = torch.tensor([1.0, 2.0])
    steered = hooks.steer(torch.ones(5), strengths, positions="all", mask=mask)(x)
    assert (steered - x)[..., 0].tolist() == [[0, 0, 0, 1], [0, 2, 2, 0]]
    step = hooks.edit(lambda rows: -rows, "all", mask)
    step(x)
    assert torch.equal(step(x[:, :1]), -x[:, :1])  # generated positions are tokens
    with pytest.raises(InputError, match=r"shape of the prompts, \(2, 3\), got \(2, 4\)"):
        step(x[:, :3])
    with pytest.raises(InputError, match="a token in every row"):
        hooks.edit(lambda rows: rows, "all", torch.zeros(2, 4, dtype=torch.bool))


def test_a_text_that_goes_on_keeps_what_it_was_given_before():
    """As each step of a generation without a cache runs the whole text again."""
    text = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    calls = []

    def count(rows):
        calls.append(len(rows))
        return rows + len(calls)

    fn = hooks.edit(count, "last")
    with torch.no_grad():
        for length in (4, 5, 6, 7):
            y = fn(text[:, :length])
        assert calls == [2, 2, 2, 2]
        assert (y - text)[0, :, 0].round().tolist() == [0, 0, 0, 1, 2, 3, 4]
        other = fn(torch.flip(text, (1,)))  # another text
        assert (other - torch.flip(text, (1,)))[0, :, 0].round().tolist() == [0] * 6 + [5]
    calls.clear()
    fn = hooks.edit(count, "last")
    for length in (4, 5):  # with gradients, calls are by themselves
        y = fn(text[:, :length])
    assert (y - text[:, :5])[0, :, 0].round().tolist() == [0, 0, 0, 0, 2]


CHOSEN = torch.tensor([[1, 0, 0, 1, 0, 1], [0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
"""Of prompts of four tokens, and of the first two that are generated."""


@pytest.mark.parametrize(
    ("positions", "want"),
    [
        ("last", [[0, 0, 0, 1, 1, 1, 1]] * 3),
        ("all", [[0, 1, 1, 1, 1, 1, 1]] * 3),
        ("prompt", [[0, 1, 1, 1, 0, 0, 0]] * 3),
        ("generated", [[0, 0, 0, 0, 1, 1, 1]] * 3),
        (CHOSEN, [[*row, 0] for row in CHOSEN.int().tolist()]),
    ],
    ids=["last", "all", "prompt", "generated", "booleans"],
)
def test_positions_are_the_same_with_and_without_a_cache(positions, want):
    text = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    text[:, 0] = text[0, 0]
    with torch.no_grad():
        fn = hooks.edit(lambda rows: rows + 1, positions)
        cached = [fn(text[:, :4]), *(fn(text[:, i : i + 1]) for i in (4, 5, 6))]
        fn = hooks.edit(lambda rows: rows + 1, positions)
        whole = [fn(text[:, :length]) for length in (4, 5, 6, 7)]
    assert (torch.cat(cached, 1) - text)[..., 0].round().tolist() == want
    assert torch.equal(torch.cat(cached, 1), whole[-1])
    again = fn(text[:, :4].flip(0))  # other texts: their prompt
    assert torch.equal((again - text[:, :4].flip(0))[..., 0].round().int(), torch.tensor(want)[:, :4])


def test_booleans_count_columns_and_never_edit_padding():
    x = stream(batch=2)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    fn = hooks.edit(lambda rows: -rows, torch.ones(2, 4, dtype=torch.bool), mask)
    assert torch.equal(fn(x), torch.where(mask.bool()[..., None], -x, x))
    for wrong in (torch.ones(2, 4), torch.ones(4, dtype=torch.bool), "first"):
        with pytest.raises(InputError, match="positions must be"):
            hooks.edit(lambda rows: rows, wrong)
    with pytest.raises(InputError, match="positions are for a batch of 2, got one of 3"):
        fn(stream())


def test_a_function_that_writes_into_its_rows_leaves_the_stream_alone():
    for pos in (1, 4):
        x = stream(pos=pos)
        y = hooks.edit(lambda rows: rows.mul_(0))(x)
        assert torch.equal(x, stream(pos=pos))
        assert float(y[:, -1].abs().sum()) == 0


def test_what_may_be_padded_on_the_left_is_warned_of_once():
    fn = hooks.edit(lambda rows: rows, "all")
    alike = stream(batch=2)
    alike[1, 0] = alike[0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fn(alike)
        hooks.edit(lambda rows: rows, "last")(stream(batch=2))
    padded = alike.clone()
    padded[1, 1] = padded[1, 0]  # BOS also stands for padding
    for x in (stream(batch=2), padded):
        fn = hooks.edit(lambda rows: rows, "all")
        with pytest.warns(UserWarning, match="padded on the left"):
            fn(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fn(x)


def test_hook_points_that_give_no_rows_of_tokens_are_one_line():
    for wrong in (torch.ones(3, 5), (torch.ones(2, 3, 5),)):
        with pytest.raises(InputError, match="expected .batch, pos, d."):
            hooks.edit(lambda rows: rows)(wrong)
