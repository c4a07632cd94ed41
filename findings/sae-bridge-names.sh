#!/usr/bin/env bash
# sae-lens 6.54.12, transformer-lens 3.9.0, transformers 5.23.0, torch 2.13.0: SAETransformerBridge has no legacy hook
# names for plain hooks. Seen 2026-11.
#
# Expected: SAETransformerBridge, a subclass of TransformerBridge, takes the hook names that TransformerBridge takes.
# Seen: blocks.N.hook_resid_post, attn.hook_z and 31 other names are missing from its hook_dict (it is rebuilt from the
# registry, without the aliases), so run_with_hooks and hooks() never call a hook at them and run_with_cache leaves
# them out, silently. An SAE at such a name does work (add_sae resolves it), and so does add_hook: only these fail.
#
# Printed: names in hook_dict; how often each way ran a hook at blocks.0.hook_resid_post.
# Output seen:
#   transformers 5.23.0 transformer-lens 3.9.0 sae-lens 6.54.12
#   TransformerBridge: 117 names, {'run_with_hooks': 1, 'hooks': 1, 'add_hook': 1}, in the cache True
#   SAETransformerBridge: 84 names, {'run_with_hooks': 0, 'hooks': 0, 'add_hook': 1}, in the cache False
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
import transformers as tf
from sae_lens import SAETransformerBridge
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge

tf.utils.logging.disable_progress_bar()
print("transformers", version("transformers"), "transformer-lens", version("transformer-lens"),
      "sae-lens", version("sae-lens"))

words = tf.PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w2")),
    bos_token="w0", eos_token="w1", unk_token="w2", pad_token="w1",
)
ids = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.3}
own = tf.GPT2LMHeadModel(tf.GPT2Config(**ids, n_embd=64, n_layer=2, n_head=4, n_positions=64))
own.save_pretrained(sys.argv[1] + "/model")
words.save_pretrained(sys.argv[1] + "/model")
tokens = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(1))
name = "blocks.0.hook_resid_post"
found = {}
for kind in (TransformerBridge, SAETransformerBridge):
    model = kind.boot_transformers(sys.argv[1] + "/model", device="cpu")
    calls = {"run_with_hooks": 0, "hooks": 0, "add_hook": 0}

    def count(way):
        def hook_fn(x, hook):
            calls[way] += 1

        return hook_fn

    with torch.inference_mode():
        model.run_with_hooks(tokens, fwd_hooks=[(name, count("run_with_hooks"))])
        with model.hooks(fwd_hooks=[(name, count("hooks"))]):
            model(tokens)
        _, cache = model.run_with_cache(tokens)
        model.add_hook(name, count("add_hook"))
        model(tokens)
    found[kind] = (list(calls.values()), name in cache)
    print(f"{kind.__name__}: {len(model.hook_dict)} names, {calls}, in the cache {name in cache}")
if found != {TransformerBridge: ([1, 1, 1], True), SAETransformerBridge: ([0, 0, 1], False)}:
    sys.exit("behaviour has changed: hook names of SAETransformerBridge")
EOF
