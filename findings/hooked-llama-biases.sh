#!/usr/bin/env bash
# transformer-lens 3.9.0, transformers 5.23.0, torch 2.13.0: HookedTransformer drops the biases of Llama models. Seen
# 2026-11.
#
# Expected: a Llama checkpoint with attention_bias and mlp_bias (both are fields of LlamaConfig) is converted with its
# biases, or refused.
# Seen: the conversion writes zeros for every bias of attention and MLP ("llama has no biases anywhere" says its
# source), silently. TransformerBridge of the same model is right.
#
# Printed: relative difference of the logits to transformers' own.
# Output seen:
#   transformers 5.23.0 transformer-lens 3.9.0
#   biases False {'hooked': '1e-06', 'bridge': '6e-07'} largest bias of hooked 0.0
#   biases True {'hooked': '5e-01', 'bridge': '5e-07'} largest bias of hooked 0.0
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
from transformer_lens import HookedTransformer
from transformer_lens import loading_from_pretrained as loading
from transformer_lens.model_bridge import TransformerBridge

tf.utils.logging.disable_progress_bar()
print("transformers", version("transformers"), "transformer-lens", version("transformer-lens"))

words = tf.PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w2")),
    bos_token="w0", eos_token="w1", unk_token="w2", pad_token="w1",
)
ids = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.3}
shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}
tokens = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(1))


def difference(a, b):
    return float((a - b).norm() / b.norm())


changed = []
for biases in (False, True):
    folder = f"{sys.argv[1]}/{biases}"
    torch.manual_seed(0)
    config = tf.LlamaConfig(**ids, **shape, attention_bias=biases, mlp_bias=biases)
    own = tf.LlamaForCausalLM(config).eval()
    for name, parameter in own.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    own.save_pretrained(folder)
    words.save_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(folder, device="cpu")
    cfg = loading.get_pretrained_model_config(folder, device="cpu")
    hooked = HookedTransformer(cfg)
    hooked.load_and_process_state_dict(loading.get_pretrained_state_dict(folder, cfg), fold_ln=False,
                                       center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    with torch.inference_mode():
        right = own(tokens).logits
        off = {"hooked": difference(hooked(tokens), right), "bridge": difference(bridge(tokens), right)}
    print("biases", biases, {name: f"{value:.0e}" for name, value in off.items()},
          "largest bias of hooked", max(float(b.abs().max()) for n, b in hooked.named_parameters() if ".b_" in n))
    if (off["hooked"] > 0.1) != biases or off["bridge"] > 1e-4:
        changed.append(f"biases {biases}")
if changed:
    sys.exit(f"behaviour has changed: {', '.join(changed)}")
EOF
