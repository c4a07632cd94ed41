#!/usr/bin/env bash
# sae-lens 6.54.12, torch 2.13.0: an SAE that normalises rows decodes latents with the norms of whatever was encoded
# last. Seen 2026-11.
#
# Expected: sae.decode(latents) of latents that sae.encode gave is their reconstruction, or raises.
# Seen: with normalize_activations "layer_norm" or "constant_norm_rescale", mean and size of the rows are kept in
# the module by encode, and used up by decode. After another batch of the same shape has been encoded, latents of the
# first come back at the size of the second, in silence; a latent switched off seems to change the output by as much
# as that. A second decode raises AttributeError.
# To do: decode right after encoding the same rows, and encode again for each decode.
#
# Printed: length of the reconstructions over what it should be, the rows encoded last being ten times as large; the
# change by switching a latent off, right after encoding the same rows, then after encoding the others; and what a
# second decode gives (over the length of its rows).
# Output seen:
#   sae-lens 6.54.12
#   none: 1 times as long; without a latent 2.6, then 2.6; once more: 4.8
#   layer_norm: 9 times as long; without a latent 2.6, then 1.8e+02; once more: 'StandardSAE' object has no
#     attribute 'ln_std'
#   constant_norm_rescale: 9.1 times as long; without a latent 2.6, then 2e+02; once more: 'StandardSAE' object has no
#     attribute 'x_norm_coeff'
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS=ignore
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 transformer-lens==3.9.0 sae-lens==6.54.12
"$work/venv/bin/python" - "$work" <<'EOF'
import sys
from importlib.metadata import version

import torch
from sae_lens import StandardSAE, StandardSAEConfig

print("sae-lens", version("sae-lens"))
generator = torch.Generator().manual_seed(0)
clean, other = torch.randn(5, 8, generator=generator), 10 * torch.randn(5, 8, generator=generator)
changed = []
for way in ("none", "layer_norm", "constant_norm_rescale"):
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=32, normalize_activations=way))
    with torch.inference_mode():
        want = sae(clean)
        of_clean, of_other = sae.encode(clean), sae.encode(other)  # both first, as when latents are compared
        got = sae.decode(of_clean)
        try:
            again = f"{(sae.decode(of_other).norm() / other.norm()).item():.2g}"
        except AttributeError as error:
            again = str(error)
        # A latent switched off: what is left of the change when the same rows were not the last to be encoded.
        edited = of_clean.clone()
        edited[:, of_clean.sum(0).argmax()] = 0
        sae.encode(clean)
        change = sae.decode(edited) - want
        sae.encode(other)
        moved = sae.decode(edited) - want
    ratio = (got.norm() / want.norm()).item()
    print(f"{way}: {ratio:.2g} times as long; without a latent {change.norm():.2g}, then {moved.norm():.2g}; "
          f"once more: {again}")
    if (abs(ratio - 1) > 1) == (way == "none") or ("no attribute" in again) == (way == "none"):
        changed.append(way)
if changed:
    sys.exit(f"behaviour has changed: {', '.join(changed)}")
EOF
