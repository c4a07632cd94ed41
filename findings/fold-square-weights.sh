#!/usr/bin/env bash
# transformer-lens 3.9.0, transformers 5.23.0, torch 2.13.0: folding norms into square weights changes the model. Seen
# 2026-11.
#
# Expected: folding the norms (enable_compatibility_mode() of a bridge, process_weights_() and the default loading of
# HookedTransformer) moves numbers between weights, and leaves the log-probabilities of the next token as they are.
# Seen: where the vocabulary, or the MLP, is exactly as wide as the residual stream, log-probabilities change by whole
# nats, and nothing is said. Which axis of a weight a norm belongs to is told from its shape, and a square one fits
# both ways. Toy models, with powers of two throughout, are easily square. An MLP of that width also changes the
# activations.
#
# Printed: the largest change of a log-probability, for a vocabulary of 80 and an MLP of 96 beside a width of 64, then
# for one of the two 64 wide. Norms have weights from 0.5 to 1.5, as after training; all 1, as in a new model, hide it
# in part.
# Output seen:
#   transformers 5.23.0 transformer-lens 3.9.0
#   TransformerBridge, LayerNorm: 1e-05; vocabulary 64 wide: 1e+01; MLP 64 wide: 6
#   TransformerBridge, RMSNorm: 1e-05; vocabulary 64 wide: 1; MLP 64 wide: 2e-05
#   HookedTransformer, LayerNorm: 1e-05; vocabulary 64 wide: 7; MLP 64 wide: 5
#   HookedTransformer, RMSNorm: 7e-06; vocabulary 64 wide: 5; MLP 64 wide: 5
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
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge

tf.utils.logging.disable_progress_bar()
print("transformers", version("transformers"), "transformer-lens", version("transformer-lens"))
D = 64
tokens = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(1))


def trained_norms(model):
    """What training leaves in norms: weights that are not 1, biases that are not 0."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "ln" in name or "norm" in name:
                scale = name.rsplit(".", 1)[1] in ("weight", "w")
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5 * scale)


def bridge(kind, vocab, mlp):
    ids = {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.3}
    if kind == "GPT2":
        config = tf.GPT2Config(**ids, n_embd=D, n_layer=2, n_head=4, n_positions=32, n_inner=mlp)
    else:
        config = tf.LlamaConfig(**ids, hidden_size=D, num_hidden_layers=2, num_attention_heads=4, intermediate_size=mlp)
    torch.manual_seed(0)
    own = tf.AutoModelForCausalLM.from_config(config)
    trained_norms(own)
    folder = f"{sys.argv[1]}/{kind}-{vocab}-{mlp}"
    own.save_pretrained(folder)
    tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w2")),
        bos_token="w0", eos_token="w1", unk_token="w2", pad_token="w1",
    ).save_pretrained(folder)
    model = TransformerBridge.boot_transformers(folder, device="cpu")
    return model, model.enable_compatibility_mode


def hooked(kind, vocab, mlp):
    model = HookedTransformer(HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=32, d_head=16, n_heads=4, d_mlp=mlp, d_vocab=vocab, act_fn="gelu", seed=0,
        normalization_type="LN" if kind == "GPT2" else "RMS", initializer_range=0.3,
    ))
    trained_norms(model)
    return model, model.process_weights_


changed = []
for make in (bridge, hooked):
    for kind in ("GPT2", "Llama"):
        found = []
        for vocab, mlp in ((80, 96), (D, 96), (80, D)):
            model, process = make(kind, vocab, mlp)
            with torch.inference_mode():
                before = model(tokens).log_softmax(-1)
                process()
                found.append((model(tokens).log_softmax(-1) - before).abs().max().item())
        where = f"{type(model).__name__}, {'LayerNorm' if kind == 'GPT2' else 'RMSNorm'}"
        print(f"{where}: {found[0]:.0e}; vocabulary {D} wide: {found[1]:.1g}; MLP {D} wide: {found[2]:.1g}")
        wrong = (False, True, (make, kind) != (bridge, "Llama"))
        if [off > 0.1 for off in found] != list(wrong):
            changed.append(where)
if changed:
    sys.exit(f"behaviour has changed: {', '.join(changed)}")
EOF
