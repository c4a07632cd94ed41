#!/usr/bin/env bash
# transformer-lens 3.9.0, transformers 5.23.0, torch 2.13.0: which tensor a bridge's hook name means depends on the
# architecture. Seen 2026-11.
#
# Expected: blocks.N.hook_mlp_out and blocks.N.mlp.hook_out are one point, as are hook_attn_out and attn.hook_out.
# Seen: they are on Llama and GPT-2. On Gemma-2 and OLMo-2 the short names are what is added to the stream, after the
# post-norm; the long ones come before that norm. On Granite they are apart by its residual multiplier. On BLOOM the
# short ones come before the sum with the stream and the long ones after it. `hook_dict[a] is hook_dict[b]` tells.
#
# Printed: relative difference short to long name (MLP, attention), and whether hook_dict has one object for both.
# Output seen:
#   transformers 5.23.0 transformer-lens 3.9.0
#   Llama 0.00 True 0.00 True
#   GPT2 0.00 True 0.00 True
#   Gemma2 0.92 False 0.74 False
#   Olmo2 0.97 False 0.82 False
#   Granite 0.78 False 0.78 False
#   Bloom 0.75 False 0.89 False
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
wide = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
kinds = {
    "Llama": tf.LlamaConfig(**ids, **wide),
    "GPT2": tf.GPT2Config(**ids, n_embd=64, n_layer=2, n_head=4),
    "Gemma2": tf.Gemma2Config(**ids, **wide, num_key_value_heads=4, head_dim=16),
    "Olmo2": tf.Olmo2Config(**ids, **wide),
    "Granite": tf.GraniteConfig(**ids, **wide, residual_multiplier=0.22),
    "Bloom": tf.BloomConfig(**ids, hidden_size=64, n_layer=2, n_head=4),
}
tokens = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(1))
changed = []
for kind, config in kinds.items():
    folder = f"{sys.argv[1]}/{kind}"
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(folder, device="cpu")
    with torch.inference_mode():
        _, cache = bridge.run_with_cache(tokens)
    line = []
    for short, long in (("hook_mlp_out", "mlp.hook_out"), ("hook_attn_out", "attn.hook_out")):
        a, b = f"blocks.1.{short}", f"blocks.1.{long}"
        off = float((cache[a] - cache[b]).norm() / cache[b].norm())
        same = bridge.hook_dict[a] is bridge.hook_dict[b]
        line.append(f"{off:.2f} {same}")
        if same != (kind in ("Llama", "GPT2")) or same != (off == 0):
            changed.append(f"{kind} {short}")
    print(kind, *line)
if changed:
    sys.exit(f"behaviour has changed: {', '.join(changed)}")
EOF
