#!/usr/bin/env bash
# transformer-lens 3.9.0, transformers 5.23.0, torch 2.13.0: bridge hooks that never run, and nothing says so. Seen
# 2026-11.
#
# Expected: a name in hook_dict is called in a forward pass, and a name that does not exist is an error, as it is in
# HookedTransformer (KeyError) and in the bridge's own add_hook (AttributeError).
# Seen: the bridge of OpenAI-GPT lists blocks.N.hook_resid_post (and hook_out) and never calls them: its blocks return
# a list, where a tuple is looked for. run_with_hooks and hooks() pass over any unknown name, a layer too many
# included.
#
# transformer-lens 4.3.0 (tried by hand) raises KeyError for unknown names.
#
# Printed: how often a hook ran in one forward pass of a model of 2 layers.
# Output seen:
#   transformers 5.23.0 transformer-lens 3.9.0
#   GPT2LMHeadModel blocks.1.hook_resid_pre: in hook_dict True, ran 1 times
#   GPT2LMHeadModel blocks.1.hook_resid_post: in hook_dict True, ran 1 times
#   GPT2LMHeadModel blocks.2.hook_resid_post: in hook_dict False, ran 0 times
#   GPT2LMHeadModel no_such_name: in hook_dict False, ran 0 times
#   OpenAIGPTLMHeadModel blocks.1.hook_resid_pre: in hook_dict True, ran 1 times
#   OpenAIGPTLMHeadModel blocks.1.hook_resid_post: in hook_dict True, ran 0 times
#   OpenAIGPTLMHeadModel blocks.2.hook_resid_post: in hook_dict False, ran 0 times
#   OpenAIGPTLMHeadModel no_such_name: in hook_dict False, ran 0 times
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
shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
tokens = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(1))


def runs(model, name):
    calls = []
    record = [(name, lambda x, hook: calls.append(1))]
    with torch.inference_mode():
        try:
            model.run_with_hooks(tokens, fwd_hooks=record)
            with model.hooks(fwd_hooks=record):
                model(tokens)
        except (KeyError, AttributeError) as error:
            return type(error).__name__
    return len(calls) // 2


changed = []
for own, expected in ((tf.GPT2LMHeadModel(tf.GPT2Config(**ids, **shape)), 1),
                      (tf.OpenAIGPTLMHeadModel(tf.OpenAIGPTConfig(**ids, **shape)), 0)):
    kind = type(own).__name__
    own.save_pretrained(f"{sys.argv[1]}/{kind}")
    words.save_pretrained(f"{sys.argv[1]}/{kind}")
    model = TransformerBridge.boot_transformers(f"{sys.argv[1]}/{kind}", device="cpu")
    for name, right in (("blocks.1.hook_resid_pre", 1), ("blocks.1.hook_resid_post", expected),
                        ("blocks.2.hook_resid_post", 0), ("no_such_name", 0)):
        print(f"{kind} {name}: in hook_dict {name in model.hook_dict}, ran {runs(model, name)} times")
        if runs(model, name) != right or (name in model.hook_dict) != name.startswith("blocks.1"):
            changed.append(f"{kind} {name}")
if changed:
    sys.exit(f"behaviour has changed: {', '.join(changed)}")
EOF
