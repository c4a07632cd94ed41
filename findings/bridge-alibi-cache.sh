#!/usr/bin/env bash
# transformer-lens 3.9.0, transformers 5.23.0, torch 2.13.0: MPT and Falcon with ALiBi have no KV cache in the bridge,
# though it says that they do. Seen 2026-11.
#
# Expected: TransformerBridge.generate gives the same activations with use_past_kv_cache=True (the default) as without.
# Seen: the attention that the bridge puts into these two families never looks at the cache it is given, so each cached
# step attends to its own token alone; nothing is said. BLOOM, which has ALiBi too but a class of its own, is right.
# Both are right in transformer-lens 4.3.0 with transformers 5.23.0 (tried by hand).
#
# Printed: relative difference of the last block's output at generated tokens to a plain forward of the same tokens,
# with the cache | without it.
# Output seen:
#   transformers 5.23.0 transformer-lens 3.9.0
#   MPT 1e+00 | 2e-07, supports_kv_cache True
#   Falcon 1e+00 | 3e-07, supports_kv_cache True
#   Bloom 6e-07 | 2e-07, supports_kv_cache True
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS=ignore
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 transformer-lens==3.9.0
"$work/venv/bin/python" - "$work" <<'EOF'
import sys
from importlib.metadata import version

import torch
import transformers as tf
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge

tf.utils.logging.disable_progress_bar()
print("transformers", version("transformers"), "transformer-lens", version("transformer-lens"))

words = tf.PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w2")),
    bos_token="w0", eos_token="w1", unk_token="w2", pad_token="w1",
)
ids = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.3}
kinds = {
    "MPT": tf.MptConfig(**ids, d_model=64, n_layers=2, n_heads=4, max_seq_len=64),
    "Falcon": tf.FalconConfig(**ids, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True,
                              multi_query=False, parallel_attn=False, new_decoder_architecture=False),
    "Bloom": tf.BloomConfig(**ids, hidden_size=64, n_layer=2, n_head=4),
}


def error(model, prompt, cache):
    seen, plain = [], []
    with model.hooks(fwd_hooks=[("blocks.1.hook_out", lambda x, hook: seen.append(x[:, -1].clone()))]):
        out = model.generate(prompt, max_new_tokens=6, do_sample=False, stop_at_eos=False, return_type="tokens",
                             verbose=False, use_past_kv_cache=cache)
    model.run_with_hooks(out[:, :-1], fwd_hooks=[("blocks.1.hook_out", lambda x, hook: plain.append(x.clone()))])
    right = plain[0][:, prompt.shape[1] :]
    return float((torch.stack(seen[1:], 1) - right).norm() / right.norm())


prompt = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(1))
changed = []
for kind, config in kinds.items():
    folder = f"{sys.argv[1]}/{kind}"
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    model = TransformerBridge.boot_transformers(folder, device="cpu")
    with torch.inference_mode():
        cached, uncached = error(model, prompt, True), error(model, prompt, False)
    print(f"{kind} {cached:.0e} | {uncached:.0e}, supports_kv_cache {model.adapter.supports_kv_cache}")
    if uncached > 1e-4 or (cached > 0.1) != (kind != "Bloom"):
        changed.append(kind)
if changed:
    sys.exit(f"behaviour has changed: {', '.join(changed)}")
EOF
