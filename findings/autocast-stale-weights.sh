#!/usr/bin/env bash
# torch 2.13.0 (CPU), seen in November 2026.
#
# A training loop enters autocast(bfloat16) anew at each step, as the documentation shows. If whoever calls it happens to
# be inside another autocast context, even one with enabled=False, every step computes with the bfloat16 copies of the
# weights that the first step made: copies are kept until the OUTERMOST context ends.
#
# Expected: the output changes when the weights have changed.
# Seen: it does not, and nothing is said. Output seen:
#   torch 2.13.0+cpu
#   alone: 0.5, then 1.5; inside autocast(enabled=False): 0.5, then 0.5; cache_enabled=False: 0.5, then 1.5
#   200 steps of SGD towards a weight of 3: alone 3.0, inside autocast(enabled=False) 50.5
set -euo pipefail
export OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
"$work/venv/bin/python" - <<'PY'
import contextlib
import sys

import torch

print("torch", torch.__version__)


def layer(weight):
    made = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(made.weight, weight)
    return made


def outside(**options):
    return torch.autocast("cpu", **options) if options else contextlib.nullcontext()


def two_outputs(inner, **outer):
    """Before and after 1 is added to a weight of 0.5."""
    w, x, found = layer(0.5), torch.ones(1, 1), []
    with outside(**outer):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, **inner):
                found.append(float(w(x).detach()))
            with torch.no_grad():
                w.weight.add_(1)
    return found


def trained(**outer):
    """A weight after gradient descent on (w x - 3 x)^2."""
    w, x = layer(0.5), torch.ones(1, 1)
    optimiser = torch.optim.SGD(w.parameters(), lr=0.05)
    with outside(**outer):
        for _ in range(200):
            with torch.autocast("cpu", torch.bfloat16):
                loss = (w(x) - 3).square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return float(w.weight.detach())


alone = two_outputs({})
nested = two_outputs({}, enabled=False)
without_cache = two_outputs({"cache_enabled": False}, enabled=False)
print(f"alone: {alone[0]:g}, then {alone[1]:g}; inside autocast(enabled=False): {nested[0]:g}, then {nested[1]:g}; "
      f"cache_enabled=False: {without_cache[0]:g}, then {without_cache[1]:g}")
good, bad = trained(), trained(enabled=False)
print(f"200 steps of SGD towards a weight of 3: alone {good:.1f}, inside autocast(enabled=False) {bad:.1f}")
if not (alone == without_cache == [0.5, 1.5] and nested == [0.5, 0.5] and abs(good - 3) < 0.1 < abs(bad - 3)):
    sys.exit("changed: a nested autocast no longer keeps the weights of the first step")
PY
