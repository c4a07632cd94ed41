#!/usr/bin/env bash
# transformer-lens 3.9.0, transformers 5.23.0, torch 2.13.0: on a bridge, hook_resid_mid is a side branch. Seen
# 2026-11.
#
# Expected: blocks.N.hook_resid_mid is the residual stream between attention and MLP, on TransformerBridge as on
# HookedTransformer: what a hook writes there goes on to hook_resid_post.
# Seen: on the bridge the name stands for the input of the MLP's norm (on OLMo-2, of the MLP); the stream itself goes
# past it. Values of norm 47,000 written there are gone after the block, silently. Reading is right.
#
# Printed: largest norm of hook_resid_post, plain and edited at hook_resid_mid.
# Output seen:
#   transformers 5.23.0 transformer-lens 3.9.0
#   Llama, TransformerBridge: 205, edited 154
#   Llama, HookedTransformer: 205, edited 46912
#   GPT2, TransformerBridge: 65, edited 59
#   Gemma2, TransformerBridge: 30, edited 31
#   Olmo2, TransformerBridge: 17, edited 18
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
wide = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
kinds = {
    "Llama": tf.LlamaConfig(**ids, **wide),
    "GPT2": tf.GPT2Config(**ids, n_embd=64, n_layer=2, n_head=4),
    "Gemma2": tf.Gemma2Config(**ids, **wide, num_key_value_heads=4, head_dim=16),
    "Olmo2": tf.Olmo2Config(**ids, **wide),
}
tokens = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(1))
huge = 1e4 * torch.linspace(-1, 1, 64)  # mean 0, norm 47,000
edit = ("blocks.1.hook_resid_mid", lambda x, hook: huge.expand_as(x))


def after(model, *edits):
    out = []
    with torch.inference_mode():
        model.run_with_hooks(tokens, fwd_hooks=[*edits, ("blocks.1.hook_resid_post", lambda x, hook: out.append(x))])
    return out[0].norm(dim=-1).max().item()


changed = []
for kind, config in kinds.items():
    folder = f"{sys.argv[1]}/tiny{list(kinds).index(kind)}"
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    both = {"TransformerBridge": TransformerBridge.boot_transformers(folder, device="cpu")}
    if kind == "Llama":
        cfg = loading.get_pretrained_model_config(folder, device="cpu")
        both["HookedTransformer"] = HookedTransformer(cfg)
        both["HookedTransformer"].load_and_process_state_dict(
            loading.get_pretrained_state_dict(folder, cfg), fold_ln=False, center_writing_weights=False
        )
    for name, model in both.items():
        plain, edited = after(model), after(model, edit)
        print(f"{kind}, {name}: {plain:.0f}, edited {edited:.0f}")
        if (edited > 1e4) != (name == "HookedTransformer"):
            changed.append(f"{kind}, {name}")
if changed:
    sys.exit(f"behaviour has changed: {'; '.join(changed)}")
EOF
