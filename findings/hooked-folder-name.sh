#!/usr/bin/env bash
# transformer-lens 3.9.0, transformers 5.23.0, torch 2.13.0: HookedTransformer's loader takes the architecture of a
# local folder from the letters of its path. Seen 2026-11.
#
# Expected: loading_from_pretrained.get_pretrained_model_config(folder) reads the architecture from folder/config.json.
# Seen: it does only if neither "llama" nor "gemma" stands anywhere in the path, parent folders included. One Llama
# model opens as "tiny", fails as "my-llama" ('NoneType' object has no attribute 'hidden_size') and as "gemma/tiny"
# (GemmaForCausalLM is not currently supported). Neither message leads to the name of the folder.
# Output seen:
#   transformers 5.23.0 transformer-lens 3.9.0
#   tiny: LlamaForCausalLM
#   my-llama: AttributeError: 'NoneType' object has no attribute 'hidden_size'
#   gemma/tiny: NotImplementedError: GemmaForCausalLM is not currently supported.
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS=ignore
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 transformer-lens==3.9.0
"$work/venv/bin/python" - "$work" <<'EOF'
import sys
from importlib.metadata import version

import transformers as tf
from transformer_lens import loading_from_pretrained as loading

tf.utils.logging.disable_progress_bar()
print("transformers", version("transformers"), "transformer-lens", version("transformer-lens"))
model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                           num_attention_heads=4))
seen = {}
for name in ("tiny", "my-llama", "gemma/tiny"):
    model.save_pretrained(f"{sys.argv[1]}/{name}")
    try:
        config = loading.get_pretrained_model_config(f"{sys.argv[1]}/{name}", device="cpu")
        seen[name] = config.original_architecture
    except (AttributeError, NotImplementedError) as error:
        seen[name] = f"{type(error).__name__}: {error}"
    print(f"{name}: {seen[name]}")
if [text.split(":")[0] for text in seen.values()] != ["LlamaForCausalLM", "AttributeError", "NotImplementedError"]:
    sys.exit("behaviour has changed: local folders of HookedTransformer's loader")
EOF
