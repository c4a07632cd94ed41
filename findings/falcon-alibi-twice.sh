#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: Falcon with ALiBi and attn_implementation="eager" adds its position bias twice.
# Seen 2026-11.
#
# Expected: "eager" and "sdpa" attention agree to rounding, as they do for Falcon without ALiBi.
# Seen: they differ. The causal mask already holds the ALiBi bias for both; eager attention then adds the bias to the
# scores once more. With half the bias, eager equals sdpa. Whatever forces eager attention, such as TransformerBridge
# of transformer-lens 3.9.0, agrees with the eager model and so not with the model that from_pretrained opens by
# default.
#
# Printed: relative difference of the logits, eager to sdpa.
# Output seen:
#   transformers 5.23.0
#   without ALiBi 3e-07, with ALiBi 8e-03, with half the bias in eager 3e-07
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS=ignore
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$work/venv/bin/python" - "$work" <<'EOF'
import sys
from importlib.metadata import version

import torch
import transformers as tf
import transformers.models.falcon.modeling_falcon as falcon

tf.utils.logging.disable_progress_bar()
print("transformers", version("transformers"))
tokens = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(1))


def difference(alibi, factor=1.0):
    config = tf.FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=alibi,
                             multi_query=False, new_decoder_architecture=False, initializer_range=0.3)
    logits, bias = {}, falcon.build_alibi_tensor
    for way in ("sdpa", "eager"):
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=way).eval()
        if way == "eager":
            falcon.build_alibi_tensor = lambda *args, **kwargs: bias(*args, **kwargs) * factor
        with torch.inference_mode():
            logits[way] = model(tokens).logits
        falcon.build_alibi_tensor = bias
    return float((logits["eager"] - logits["sdpa"]).norm() / logits["sdpa"].norm())


none, once, half = difference(False), difference(True), difference(True, 0.5)
print(f"without ALiBi {none:.0e}, with ALiBi {once:.0e}, with half the bias in eager {half:.0e}")
if none > 1e-4 or once < 1e-3 or half > 1e-4:
    sys.exit("behaviour has changed: eager and sdpa attention of Falcon")
EOF
