#!/usr/bin/env bash
# sae-lens 6.54.12, torch 2.13.0: an SAE for hook_z remembers the shape of its first input. Seen 2026-11.
#
# Expected: StandardSAE with reshape_activations="hook_z" returns what has the shape of its input, (..., heads,
# d_head).
# Seen: it takes d_head from its first input only. After (2, 4, 6) an input (2, 3, 8), of the same width 24, comes back
# as (2, 4, 6), silently: the same numbers under other heads.
#
# Expected: a copy.deepcopy of it computes the same.
# Seen: a copy made before the first call raises AttributeError when called: it writes d_head into the original (a
# function that holds `self` is copied by reference), and looks for it in itself. A copy made after the first call
# works.
# Output seen:
#   sae-lens 6.54.12
#   inputs (2, 4, 6), (2, 3, 8); outputs (2, 4, 6) (2, 4, 6)
#   deep copy: 'StandardSAE' object has no attribute 'd_head' | original now has d_head 6
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS=ignore
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 transformer-lens==3.9.0 sae-lens==6.54.12
"$work/venv/bin/python" - "$work" <<'EOF'
import copy
import sys
from importlib.metadata import version

import torch
from sae_lens import StandardSAE, StandardSAEConfig

print("sae-lens", version("sae-lens"))


def fresh():
    return StandardSAE(StandardSAEConfig(d_in=24, d_sae=48, reshape_activations="hook_z"))


with torch.inference_mode():
    sae = fresh()
    shapes = [tuple(sae(torch.randn(shape)).shape) for shape in ((2, 4, 6), (2, 3, 8))]
    print("inputs (2, 4, 6), (2, 3, 8); outputs", *shapes)
    original = fresh()
    copied = copy.deepcopy(original)
    try:
        raised = None
        copied(torch.randn(2, 4, 6))
    except AttributeError as error:
        raised = str(error)
    print("deep copy:", raised, "| original now has d_head", getattr(original, "d_head", None))
if shapes != [(2, 4, 6), (2, 4, 6)] or raised is None:
    sys.exit("behaviour has changed: hook_z SAE of sae-lens")
EOF
