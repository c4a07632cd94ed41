#!/usr/bin/env bash
# torch 2.13.0 (CPU), seen in November 2026 on an x86 processor with AMX.
#
# A linear layer in bfloat16 reads batches of texts of many lengths, each of which is a shape of its own. oneDNN makes
# machine code for each shape and keeps that of the last 1,024 (ONEDNN_PRIMITIVE_CACHE_CAPACITY, which its manual tells
# of). It looks like a leak: nothing in Python holds this memory, and it does not depend on the size of the layer.
#
# Expected: with room for 128 in that cache, memory stops growing after 128 shapes.
# Seen: it goes on growing, more slowly, as torch's own layer above oneDNN keeps another 1,024 (LRU_CACHE_CAPACITY). Only
# with both set does it stop. Times are the same. Output seen:
#   torch 2.13.0+cpu, growth over 600 more shapes of one layer of 64 x 64:
#   as it comes                           400 MB
#   ONEDNN_PRIMITIVE_CACHE_CAPACITY=128   265 MB
#   LRU_CACHE_CAPACITY=128                405 MB
#   both                                   19 MB
set -euo pipefail
export OMP_NUM_THREADS=1
unset ONEDNN_PRIMITIVE_CACHE_CAPACITY LRU_CACHE_CAPACITY
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cat > "$work/grow.py" <<'PY'
import torch

layer = torch.nn.Linear(64, 64).bfloat16()


def anonymous_after(lengths):
    """MB of memory that no file backs, once texts of these lengths were read."""
    with torch.no_grad():
        for n in lengths:
            layer(torch.ones(n, 64, dtype=torch.bfloat16))
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) // 1024


if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
    raise SystemExit("this processor has no bfloat16 products of oneDNN: nothing to see")
first = anonymous_after(range(1, 300))
print(anonymous_after(range(300, 900)) - first)
PY
cat > "$work/compare.py" <<'PY'
import os
import subprocess
import sys

import torch

grow, few = sys.argv[1], "128"
ONEDNN, LAYER = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"
ways = {
    "as it comes": {},
    f"{ONEDNN}={few}": {ONEDNN: few},
    f"{LAYER}={few}": {LAYER: few},
    "both": {ONEDNN: few, LAYER: few},
}
print(f"torch {torch.__version__}, growth over 600 more shapes of one layer of 64 x 64:")
found = []
for name, extra in ways.items():
    done = subprocess.run([sys.executable, grow], env={**os.environ, **extra}, capture_output=True, text=True, check=True)
    found.append(int(done.stdout))
    print(f"  {name:36s} {found[-1]:4d} MB")
default, one, other, both = found
if not (default > 150 and one > default / 3 and other > default / 3 and both < default / 5):
    sys.exit("changed: products of many shapes are kept in another way")
PY
"$work/venv/bin/python" "$work/compare.py" "$work/grow.py"
