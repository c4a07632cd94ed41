#!/usr/bin/env bash
# transformer-lens 3.9.0 with transformers 5.24.0 (torch 2.13.0): the bridge loses its KV cache. Seen 2026-11.
#
# Expected: TransformerBridge.generate gives the same activations with its KV cache as a plain forward of the same
# tokens.
# Seen: on Llama, GPT-2 and Gemma-2 every cached step after the first attends to its own token alone (its attention
# pattern has one column). Nothing is raised; the only sign is a FutureWarning about the name of an argument, which the
# architectures that are right give too. transformers 5.24 calls that argument of its attention `cache`; the bridge's
# own attention looks for `past_key_values` and `layer_past`. BLOOM and GPT-NeoX still say `layer_past`, OPT runs
# transformers' own attention: right. `use_past_kv_cache=False` is right, and so is transformers 5.23.0;
# transformer-lens 4.3.0 (tried by hand) is as wrong.
#
# Printed: relative difference of the last block's output at generated tokens, with the cache | without it.
# Output seen:
#   transformers 5.24.0 transformer-lens 3.9.0
#   Llama 1e+00 | 4e-07, GPT2 1e+00 | 2e-07, Gemma2 7e-01 | 1e-07, Bloom 6e-07 | 2e-07, GPTNeoX 5e-07 | 1e-07, OPT
#       6e-07 | 2e-07
#   transformers 5.23.0 transformer-lens 3.9.0
#   Llama 1e-06 | 4e-07, GPT2 6e-07 | 2e-07, Gemma2 3e-07 | 1e-07, Bloom 6e-07 | 2e-07, GPTNeoX 5e-07 | 1e-07, OPT
#       6e-07 | 2e-07
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS=ignore
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/run.py" <<'EOF'
import sys
from importlib.metadata import version

import torch
import transformers as tf
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge

tf.utils.logging.disable_progress_bar()
new = version("transformers") == "5.24.0"
print("transformers", version("transformers"), "transformer-lens", version("transformer-lens"))
words = tf.PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w2")),
    bos_token="w0", eos_token="w1", unk_token="w2", pad_token="w1",
)
ids = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.3}
wide = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
mlp = {"intermediate_size": 96}
kinds = {
    "Llama": tf.LlamaConfig(**ids, **wide, **mlp, num_key_value_heads=2),
    "GPT2": tf.GPT2Config(**ids, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "Gemma2": tf.Gemma2Config(**ids, **wide, **mlp, num_key_value_heads=2, head_dim=16),
    "Bloom": tf.BloomConfig(**ids, hidden_size=64, n_layer=2, n_head=4),
    "GPTNeoX": tf.GPTNeoXConfig(**ids, **wide, **mlp),
    "OPT": tf.OPTConfig(**ids, **wide, ffn_dim=96, word_embed_proj_dim=64),
}


def error(model, prompt, cache):
    seen = []
    record = [("blocks.1.hook_out", lambda x, hook: seen.append(x[:, -1].clone()))]
    with model.hooks(fwd_hooks=record):
        out = model.generate(prompt, max_new_tokens=6, do_sample=False, stop_at_eos=False, return_type="tokens",
                             verbose=False, use_past_kv_cache=cache)
    plain = []
    model.run_with_hooks(out[:, :-1], fwd_hooks=[("blocks.1.hook_out", lambda x, hook: plain.append(x.clone()))])
    right = plain[0][:, prompt.shape[1] :]
    return float((torch.stack(seen[1:], 1) - right).norm() / right.norm())


prompt = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(1))
line, changed = [], []
for kind, config in kinds.items():
    folder = f"{sys.argv[1]}/{kind}"
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    model = TransformerBridge.boot_transformers(folder, device="cpu")
    with torch.inference_mode():
        cached, uncached = error(model, prompt, True), error(model, prompt, False)
    line.append(f"{kind} {cached:.0e} | {uncached:.0e}")
    lost = new and kind in ("Llama", "GPT2", "Gemma2")
    if uncached > 1e-4 or (cached > 0.1) != lost:
        changed.append(kind)
print(*line, sep=", ")
if changed:
    sys.exit(f"behaviour has changed: {', '.join(changed)}")
EOF
python3 -m venv "$work/venv"
for release in 5.24.0 5.23.0; do
    "$work/venv/bin/pip" install --quiet torch==2.13.0 "transformers==$release" transformer-lens==3.9.0
    "$work/venv/bin/python" "$work/run.py" "$work/$release"
done
