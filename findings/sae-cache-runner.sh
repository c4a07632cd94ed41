#!/usr/bin/env bash
# sae-lens 6.54.12, datasets 5.2.0: CacheActivationsRunner writes more rows than asked, the same texts again, and in
# order. Seen 2026-11.
#
# Expected: training_tokens rows are cached, shuffled (shuffle=True is the default), and where the texts are too few
# it stops with the warning that its code has for this ("Ran out of samples while filling the buffer").
# Seen: whole buffers are written (of 2 GB by default, about 120,000 rows of width 4,096). Texts that run out begin
# again from the first, so that rows are there twice and a held-out part of the folder has been trained on. The one
# warning, for texts given as a Dataset, compares the number of texts with that of tokens, and comes with plenty too.
# Only the dataset that run() returns is shuffled: the folder, which is what cached_activations_path reads in
# training, keeps the order of the texts.
# To do: take a held-out part from texts of its own, look for repeated token_ids, and save the dataset that run()
# returns.
# Output seen:
#   sae-lens 6.54.12 datasets 5.2.0
#   30 texts, 10 sequences asked: 16 on disk, [0, 1, 2, 3, 4, 5] ..., returned [6, 15, 11, 10, 9, 3] ...
#   5 texts, 10 sequences asked: [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]; warned of several epochs: True, True
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1 PYTHONWARNINGS=ignore
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 transformer-lens==3.9.0 sae-lens==6.54.12 \
    datasets==5.2.0
"$work/venv/bin/python" - "$work" <<'EOF'
import sys
import warnings
from importlib.metadata import version

import datasets
import torch
import transformers as tf
from datasets import Dataset, load_from_disk
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from sae_lens import cache_activations_runner as module
from transformer_lens import HookedTransformer, HookedTransformerConfig

datasets.disable_progress_bars()
tf.utils.logging.disable_progress_bar()
print("sae-lens", version("sae-lens"), "datasets", version("datasets"))
model = HookedTransformer(HookedTransformerConfig(
    n_layers=1, d_model=8, n_ctx=4, d_head=4, n_heads=2, d_vocab=400, act_fn="gelu", seed=0,
))
module.load_model = lambda **options: model  # it takes a model's name only; this one needs no download
CONTEXT = 4


def cached(name, texts, training_tokens, batches_in_buffer):
    """First tokens of the sequences on disk, and those of the dataset that run() returns."""
    path = f"{sys.argv[1]}/{name}"
    config = CacheActivationsRunnerConfig(
        dataset_path="given below", model_name="given above", hook_name="blocks.0.hook_resid_post", d_in=8,
        context_size=CONTEXT, model_batch_size=2, training_tokens=training_tokens, prepend_bos=False, device="cpu",
        buffer_size_gb=batches_in_buffer * 2 * CONTEXT * 8 * 4 / 1e9, streaming=False, shuffle=True,
        new_cached_activations_path=path,
    )
    given = Dataset.from_list([{"tokens": [i, 100 + i, 200 + i, 300 + i]} for i in range(texts)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        returned = CacheActivationsRunner(config, override_dataset=given).run()
    warned = any("multiple training epochs" in str(warning.message) for warning in caught)
    return warned, *([row[0] for row in part["token_ids"]] for part in (load_from_disk(path), returned))


warned_plenty, plenty, shuffled = cached("plenty", texts=30, training_tokens=40, batches_in_buffer=8)
warned_few, few, _ = cached("few", texts=5, training_tokens=40, batches_in_buffer=5)
print(f"30 texts, 10 sequences asked: {len(plenty)} on disk, {plenty[:6]} ..., returned {shuffled[:6]} ...")
print(f"5 texts, 10 sequences asked: {few}; warned of several epochs: {warned_plenty}, {warned_few}")
order = plenty == list(range(16)) == sorted(shuffled) != shuffled
if not (order and few == [*range(5), *range(5)] and warned_plenty and warned_few):
    sys.exit("behaviour has changed: CacheActivationsRunner of sae-lens")
EOF
