#!/usr/bin/env bash
# matplotlib 3.11.2, seen in November 2026.
#
# `text.parse_math: False` is the documented way to draw texts with dollar signs, such as names that users gave, as they
# are. Logarithmic axes write their own tick labels as markup and go through the same setting, so that 10³ becomes the
# letters of its source. No warning, and ScalarFormatter's offset (1e6) is not affected.
#
# Expected: the setting is for texts of the caller, or LogFormatter writes plain text where markup is not read.
# Seen: the label of 1000 is over seven times as wide: "$\mathdefault{10^{3}}$" is drawn letter by letter. Output seen:
#   matplotlib 3.11.2
#   label of 1000: '$\\mathdefault{10^{3}}$'
#   drawn width in pixels: markup read 25, not read 185
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet matplotlib==3.11.2 numpy==2.4.6
MPLCONFIGDIR="$work" "$work/venv/bin/python" - <<'PY'
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

widths = {}
for read in (True, False):
    with matplotlib.rc_context({"text.parse_math": read, "font.size": 10, "figure.dpi": 100}):
        figure = Figure()
        axes = figure.add_subplot()
        axes.plot([1, 10, 1000], [1, 2, 3])
        axes.set_xscale("log")
        figure.canvas.draw()
        label = next(each for each in axes.get_xticklabels() if "{3}" in each.get_text())
        widths[read] = label.get_window_extent().width
print(f"matplotlib {matplotlib.__version__}")
print(f"label of 1000: {label.get_text()!r}")
print(f"drawn width in pixels: markup read {widths[True]:.0f}, not read {widths[False]:.0f}")
if widths[False] < 3 * widths[True]:
    sys.exit("changed: labels of logarithmic axes are drawn as numbers where markup is not read")
PY
