#!/usr/bin/env bash
# transformer-lens 3.9.0, transformers 5.23.0, torch 2.13.0: the loss of a list of texts counts padding. Seen 2026-11.
#
# Expected: model(texts, return_type="loss") is the mean loss of the texts' tokens, on whichever side they are padded.
# Seen: with padding on the right, the default, predictions of padding tokens are averaged in, so that a short text's
# loss depends on the longest text beside it; nothing is said. With padding_side="left" they are left out and the mean
# is right. Logits of the texts' own places are right both ways. The same in both classes.
# To do: return_type="logits" and a mask of one's own, one text at a time, or padding_side="left".
# Output seen:
#   transformers 5.23.0 transformer-lens 3.9.0
#   TransformerBridge, 3 and 6 words: mean of their tokens 5.66, as a list 5.94, padded on the left 5.66
#   TransformerBridge, 3 and 12 words: mean of their tokens 5.81, as a list 6.28, padded on the left 5.81
#   TransformerBridge, 3 and 24 words: mean of their tokens 5.97, as a list 6.55, padded on the left 5.97
#   TransformerBridge, 3 and 48 words: mean of their tokens 6.11, as a list 6.92, padded on the left 6.11
#   HookedTransformer, 3 and 6 words: mean of their tokens 7.44, as a list 6.95, padded on the left 7.44
#   HookedTransformer, 3 and 12 words: mean of their tokens 6.81, as a list 6.34, padded on the left 6.81
#   HookedTransformer, 3 and 24 words: mean of their tokens 6.85, as a list 6.43, padded on the left 6.85
#   HookedTransformer, 3 and 48 words: mean of their tokens 6.56, as a list 6.28, padded on the left 6.56
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
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge

tf.utils.logging.disable_progress_bar()
print("transformers", version("transformers"), "transformer-lens", version("transformer-lens"))
folder = sys.argv[1] + "/model"
vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 80)}
words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tf.PreTrainedTokenizerFast(
    tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
).save_pretrained(folder)
ids = {"vocab_size": 80, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.3}
torch.manual_seed(0)
tf.GPT2LMHeadModel(tf.GPT2Config(**ids, n_embd=64, n_layer=2, n_head=4, n_positions=64)).save_pretrained(folder)
cfg = HookedTransformerConfig(
    n_layers=2, d_model=64, n_ctx=64, d_head=16, n_heads=4, d_vocab=80, act_fn="gelu", seed=0, initializer_range=0.3,
)
both = (
    TransformerBridge.boot_transformers(folder, device="cpu"),
    HookedTransformer(cfg, tokenizer=tf.AutoTokenizer.from_pretrained(folder)),
)
short = "w5 w6 w7"
longer = [" ".join(f"w{10 + i % 60}" for i in range(n)) for n in (6, 12, 24, 48)]
changed = []
for model in both:
    name = type(model).__name__
    with torch.inference_mode():
        assert [model.to_tokens(text).shape[1] for text in (short, longer[0])] == [4, 7]  # a BOS, then the words

        def loss(texts, **options):
            return model(texts, return_type="loss", **options).item()

        alone = [(loss(text), model.to_tokens(text).shape[1] - 1) for text in (short, *longer)]
        for i, text in enumerate(longer, 1):
            want = (alone[0][0] * alone[0][1] + alone[i][0] * alone[i][1]) / (alone[0][1] + alone[i][1])
            right, left = loss([short, text]), loss([short, text], padding_side="left")
            print(f"{name}, 3 and {alone[i][1]} words: mean of their tokens {want:.2f}, as a list {right:.2f}, "
                  f"padded on the left {left:.2f}")
            if abs(left - want) > 1e-3 or abs(right - want) < 0.05:
                changed.append(f"{name}, {alone[i][1]} words")
if changed:
    sys.exit(f"behaviour has changed: {', '.join(changed)}")
EOF
