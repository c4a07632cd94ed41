"""The caller's modes of torch, put aside and put back."""

import pytest
import torch

from glp_lens import numerics
from tests.conformance import MODES


def modes():
    torch.autocast_increment_nesting()
    return (
        torch.autocast_decrement_nesting(),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )


PLAIN = modes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ours", [numerics.own, numerics.training])
def test_modes_are_put_aside_and_put_back_even_after_an_error(mode, ours):
    seen = []

    @ours()
    def fail():
        seen.append(modes())
        raise ZeroDivisionError

    with MODES[mode]():
        before = modes()
        with pytest.raises(ZeroDivisionError):
            fail()
        assert modes() == before
    assert modes() == PLAIN
    ((_, autocast, inference, grad, dtype),) = seen
    assert (autocast, inference) == (False, False)
    assert (grad, dtype) == (before[3:] if ours is numerics.own else (True, torch.float32))


@pytest.mark.parametrize("enabled", [False, True])
def test_training_within_autocast_sees_each_steps_weights(enabled):
    layer, x = torch.nn.Linear(3, 2), torch.ones(1, 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled), numerics.training():
        outputs = []
        for weight in (1.0, 2.0):
            torch.nn.init.constant_(layer.weight, weight)
            torch.nn.init.zeros_(layer.bias)
            with torch.autocast("cpu", torch.bfloat16):
                outputs.append(layer(x)[0, 0].item())
    assert outputs == [3.0, 6.0]
