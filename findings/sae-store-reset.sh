#!/usr/bin/env bash
# sae-lens 6.54.12: ActivationsStore is neither reset by reset_input_dataset() nor, once used, shuffled. Seen 2026-11.
#
# Expected: after reset_input_dataset() ("resets the input dataset iterator to the beginning") the next batch is the
# first one again, and after shuffle_input_dataset(seed) batches come in another order.
# Seen: both set an attribute (iterable_dataset) that nothing reads. After a reset batches go on where they were, so
# that two autoencoders compared on one store see other texts, and in run_evals, which resets between the two, L0 and
# variance are of other texts than the losses. Shuffling works before the first batch; afterwards not before all texts
# have passed.
# To do: a new store for each measurement.
#
# Printed: which of 12 texts, four batches of three, each batch has.
# Output seen:
#   sae-lens 6.54.12
#   reset after each batch: [0, 1, 2] [3, 4, 5] [6, 7, 8]
#   shuffled before the first batch: [8, 11, 4]
#   shuffled after the first batch: [0, 1, 2] [3, 4, 5] [6, 7, 8] [9, 10, 11] [8, 11, 4]
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
from datasets import Dataset
from sae_lens import ActivationsStore, StandardSAE, StandardSAEConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig

print("sae-lens", version("sae-lens"))
model = HookedTransformer(HookedTransformerConfig(
    n_layers=1, d_model=8, n_ctx=4, d_head=4, n_heads=2, d_vocab=400, act_fn="gelu", seed=0,
))
sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=16))
sae.cfg.metadata.hook_name, sae.cfg.metadata.prepend_bos = "blocks.0.hook_resid_post", False


def store():
    texts = Dataset.from_list([{"tokens": [i, 100 + i, 200 + i, 300 + i]} for i in range(12)])
    return ActivationsStore.from_sae(model, sae, texts, context_size=4, store_batch_size_prompts=3)


def batch(of):
    """Which texts the next batch has."""
    return of.get_batch_tokens()[:, 0].tolist()


fresh = store()
reset = [batch(fresh), fresh.reset_input_dataset(), batch(fresh), fresh.reset_input_dataset(), batch(fresh)][::2]
print("reset after each batch:", *reset)
early, late = store(), store()
early.shuffle_input_dataset(seed=1)
first = batch(early)
print("shuffled before the first batch:", first)
seen = [batch(late)]
late.shuffle_input_dataset(seed=1)
seen += [batch(late) for _ in range(4)]
print("shuffled after the first batch:", *seen)
in_order = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
if reset != in_order[:3] or seen != [*in_order, first] or first == in_order[0]:
    sys.exit("behaviour has changed: resetting and shuffling ActivationsStore of sae-lens")
EOF
