#!/usr/bin/env bash
# transformer-lens 3.9.0, transformers 5.23.0, torch 2.13.0: no flag of a bridge says what its weights are. Seen
# 2026-11.
#
# Expected: from bridge.compatibility_mode (or cfg.normalization_type, "LNPre" on a folded HookedTransformer) one can
# tell whether norms are folded and writing weights centred, which changes every activation of a LayerNorm model.
# Seen: after process_weights() both are done and compatibility_mode is False; after
# enable_compatibility_mode(no_processing=True) neither is and it is True; normalization_type never changes. The
# private _weights_processed tells those apart, but is True too where centring was switched off, and on an RMS model,
# whose norms are folded and whose stream stays as it is. Only looking at the weights and the stream tells.
#
# Printed: compatibility_mode, _weights_processed, normalization_type; whether the weights of ln1 are all 1, whether
# the stream after block 0 has mean 0, and its relative change.
# Output seen:
#   transformers 5.23.0 transformer-lens 3.9.0
#   gpt2 as opened: False, False, LN; folded False, centred False, changed by 0e+00
#   gpt2 process_weights(): False, True, LN; folded True, centred True, changed by 1e-01
#   gpt2 process_weights(center_writing_weights=False): False, True, LN; folded True, centred False, changed by 6e-07
#   gpt2 enable_compatibility_mode(no_processing=True): True, False, LN; folded False, centred False, changed by 0e+00
#   llama as opened: False, False, RMS; folded False, centred False, changed by 0e+00
#   llama process_weights(): False, True, RMS; folded True, centred False, changed by 6e-07
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
    "gpt2": tf.GPT2Config(**ids, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "llama": tf.LlamaConfig(**ids, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4),
}
ways = {
    "as opened": lambda m: None,
    "process_weights()": lambda m: m.process_weights(),
    "process_weights(center_writing_weights=False)": lambda m: m.process_weights(center_writing_weights=False),
    "enable_compatibility_mode(no_processing=True)": lambda m: m.enable_compatibility_mode(True, no_processing=True),
}
tokens = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(1))
rows = {}
for kind, config in kinds.items():
    folder = f"{sys.argv[1]}/{kind}"
    torch.manual_seed(0)
    own = tf.AutoModelForCausalLM.from_config(config)
    for parameter in own.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    own.save_pretrained(folder)
    words.save_pretrained(folder)
    for way, process in list(ways.items())[: 2 if kind == "llama" else None]:
        model = TransformerBridge.boot_transformers(folder, device="cpu")
        process(model)
        out = []
        with torch.inference_mode():
            model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_out", lambda x, hook: out.append(x.clone()))])
        folded = (model.blocks[0].ln1.weight - 1).abs().max().item() < 1e-6
        centred = out[0].mean(-1).abs().max().item() < 1e-5
        raw = out[0] if way == "as opened" else raw
        change = float((out[0] - raw).norm() / raw.norm())
        rows[kind, way] = (model.compatibility_mode, model._weights_processed, folded, centred)
        print(f"{kind} {way}: {model.compatibility_mode}, {model._weights_processed}, "
              f"{model.cfg.normalization_type}; folded {folded}, centred {centred}, changed by {change:.0e}")
process, uncentred, names = list(ways)[1:]
expected = {
    ("gpt2", process): (False, True, True, True), ("gpt2", uncentred): (False, True, True, False),
    ("gpt2", names): (True, False, False, False), ("llama", process): (False, True, True, False),
}
changed = [" ".join(key) for key, row in expected.items() if rows[key] != row]
if changed:
    sys.exit(f"behaviour has changed: {', '.join(changed)}")
EOF
