#!/usr/bin/env bash
# transformer-lens 3.9.0, transformers 5.23.0, torch 2.13.0: the bridge of Cohere models rotates other dimensions. Seen
# 2026-11.
#
# Expected: TransformerBridge.boot_transformers of a Cohere or Cohere2 model gives the logits of the transformers
# model.
# Seen: other logits, silently. Cohere's rotary embedding turns neighbouring dimensions (0,1), (2,3), ...; the bridge
# turns the halves (i, i + d/2) as Llama does, with Cohere's cosines. The second number is the test of that
# cause: transformers' own model with Llama's `rotate_half` in the place of Cohere's computes what the bridge computes.
# Its adapter says that it leaves this to the transformers module; the attention it uses computes it itself. Llama, and
# StableLM with a quarter of its dimensions rotated, are right, and transformer-lens 4.3.0 (tried by hand) is right on
# Cohere too.
#
# Printed: relative difference of the logits to transformers' own, and to transformers' own with Llama's rotation.
# Output seen:
#   transformers 5.23.0 transformer-lens 3.9.0
#   Llama 0e+00
#   StableLm 0e+00
#   Cohere 3e-01, with Llama's rotation 4e-07
#   Cohere2 3e-01, with Llama's rotation 4e-07
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
import transformers.models.cohere.modeling_cohere as cohere
import transformers.models.cohere2.modeling_cohere2 as cohere2
from transformers.models.llama.modeling_llama import rotate_half

words = tf.PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w2")),
    bos_token="w0", eos_token="w1", unk_token="w2", pad_token="w1",
)
ids = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.3}
shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}
kinds = {
    "Llama": (tf.LlamaConfig(**ids, **shape), None),
    "StableLm": (tf.StableLmConfig(**ids, **shape), None),
    "Cohere": (tf.CohereConfig(**ids, **shape), cohere),
    "Cohere2": (tf.Cohere2Config(**ids, **shape, sliding_window=6), cohere2),
}


def difference(a, b):
    return float((a - b).norm() / b.norm())


tokens = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(1))
changed = []
for kind, (config, module) in kinds.items():
    folder = f"{sys.argv[1]}/{kind}"
    torch.manual_seed(0)
    own = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    own.save_pretrained(folder)
    words.save_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(folder, device="cpu")
    with torch.inference_mode():
        ours, theirs = bridge(tokens, return_type="logits"), own(tokens).logits
        line = f"{kind} {difference(ours, theirs):.0e}"
        if module is None:
            expected = difference(ours, theirs) < 1e-4
        else:
            module.rotate_half = rotate_half
            halves = difference(ours, own(tokens).logits)
            line += f", with Llama's rotation {halves:.0e}"
            expected = difference(ours, theirs) > 0.1 and halves < 1e-4
    print(line)
    if not expected:
        changed.append(kind)
if changed:
    sys.exit(f"behaviour has changed: {', '.join(changed)}")
EOF
