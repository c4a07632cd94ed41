#!/usr/bin/env bash
# torch 2.13.0 (CPU): how many normal numbers are drawn at once decides which they are. Seen 2026-11.
#
# Expected: with one seed, torch.randn(3, 24) is the beginning of torch.randn(5, 24), and two draws of n numbers are
# one draw of 2n, as torch.rand does it.
# Seen: where the count is not a multiple of 16 the last 16 numbers are drawn again, and fewer than 16 are drawn in
# another way, as are those written into an array that is not contiguous. So most rows agree and the last one in part:
# noise for 3 rows is not that for the first 3 of 5, and a loop over blocks has other numbers than one call, unless
# blocks times width are multiples of 16, as with the widths of language models they usually are. A comparison "with
# the same noise" needs the noise drawn once and cut, not a seed.
#
# Printed: how many numbers are the same.
# Output seen:
#   torch 2.13.0+cpu
#   of 24 numbers a row, as in 5 rows at once: [8] [24, 24] [24, 24, 8] [24, 24, 24, 24]
#   of 2n numbers, drawn n and n, as 2n at once: {8: 0, 15: 0, 16: 32, 24: 8, 32: 64}
#   of 128 numbers, written into a transposed array: 0
#   uniform numbers: {8: 16, 15: 30, 16: 32, 24: 48, 32: 64}
set -euo pipefail
export OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
"$work/venv/bin/python" - "$work" <<'EOF'
import sys

import torch

print("torch", torch.__version__)


def drawn(*shapes, make=torch.randn, **options):
    """One array after the other, with the same seed each time."""
    generator = torch.Generator().manual_seed(0)
    return [make(*shape, generator=generator, **options) for shape in shapes]


def same(first, second):
    return int((first == second).sum())


rows5 = drawn((5, 24))[0]
prefix = [[same(a, b) for a, b in zip(drawn((n, 24))[0], rows5, strict=False)] for n in (1, 2, 3, 4)]
print("of 24 numbers a row, as in 5 rows at once:", *prefix)
pieces = {n: same(torch.cat(drawn((n,), (n,))), drawn((2 * n,))[0]) for n in (8, 15, 16, 24, 32)}
print("of 2n numbers, drawn n and n, as 2n at once:", pieces)
transposed = same(torch.empty(32, 4).t().normal_(generator=torch.Generator().manual_seed(0)), drawn((4, 32))[0])
print("of 128 numbers, written into a transposed array:", transposed)
uniform = {n: same(torch.cat(drawn((n,), (n,), make=torch.rand)), drawn((2 * n,), make=torch.rand)[0]) for n in pieces}
print("uniform numbers:", uniform)
if prefix != [[8], [24, 24], [24, 24, 8], [24] * 4] or pieces != {8: 0, 15: 0, 16: 32, 24: 8, 32: 64} or transposed:
    sys.exit("behaviour has changed: which numbers torch.randn draws")
if uniform != {n: 2 * n for n in pieces}:
    sys.exit("behaviour has changed: which numbers torch.rand draws")
EOF
