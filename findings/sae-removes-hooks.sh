#!/usr/bin/env bash
# sae-lens 6.54.12, transformer-lens 3.9.0, transformers 5.23.0, torch 2.13.0: an SAE attached for one call removes
# the hooks at its hook point. Seen 2026-11.
#
# Expected: run_with_saes(...) attaches an SAE for one call and leaves the model as it was; a steering hook at the
# same hook point, permanent or within `with model.hooks(...)`, runs during the call or raises, and runs after it.
# Seen: while the SAE is there hooks at its point do not run, and afterwards they are gone, permanent ones and those
# of a context that is still open too: steering ends, and nothing is said. In SAETransformerBridge hooks added later
# at the name that the SAE has (hook_resid_post) never run either, in this model, nor those of hooks() at either of its
# names; add_hook at the bridge's own name (hook_out) does. sae-bridge-names.sh shows what else that class misses.
# To do: steer at another hook point or within the same hook as the SAE, reset hooks after each use of SAEs, and count
# calls. The SAE here has use_error_term=True, by which alone the model's output is unchanged.
#
# Printed: how often a hook ran in a forward pass; what the steering changed.
# Output seen:
#   transformers 5.23.0 transformer-lens 3.9.0 sae-lens 6.54.12
#   HookedSAETransformer: before, with and after an SAE a permanent hook ran [1, 0, 0] times, one of hooks() [1, 0, 0]
#     logits changed by 6, 3e-06, 0; add_hook, hooks() of the fresh model [1, 1], of one that had an SAE [1, 1]
#   SAETransformerBridge: before, with and after an SAE a permanent hook ran [1, 0, 0] times, one of hooks() [0, 0, 0]
#     logits changed by 8, 4e-06, 0; add_hook, hooks() of the fresh model [1, 1], of one that had an SAE [0, 0, 1, 0]
# (the last four: at hook_resid_post, then at hook_out)
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS=ignore
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 transformer-lens==3.9.0 sae-lens==6.54.12
"$work/venv/bin/python" - "$work" <<'EOF'
import sys
from importlib.metadata import version

import torch
import transformers as tf
from sae_lens import HookedSAETransformer, SAETransformerBridge, StandardSAE, StandardSAEConfig
from tokenizers import Tokenizer, models
from transformer_lens import HookedTransformerConfig

tf.utils.logging.disable_progress_bar()
print("transformers", version("transformers"), "transformer-lens", version("transformer-lens"),
      "sae-lens", version("sae-lens"))
folder = sys.argv[1] + "/model"
ids = {"vocab_size": 80, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.3}
torch.manual_seed(0)
tf.GPT2LMHeadModel(tf.GPT2Config(**ids, n_embd=64, n_layer=2, n_head=4, n_positions=64)).save_pretrained(folder)
tf.PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(80)}, unk_token="w2")),
    bos_token="w0", eos_token="w1", unk_token="w2", pad_token="w1",
).save_pretrained(folder)
cfg = HookedTransformerConfig(
    n_layers=2, d_model=64, n_ctx=64, d_head=16, n_heads=4, d_vocab=80, act_fn="gelu", seed=0, initializer_range=0.3,
)
hook = "blocks.0.hook_resid_post"
sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=128))
sae.cfg.metadata.hook_name = hook
tokens = torch.randint(3, 80, (2, 10), generator=torch.Generator().manual_seed(1))
push = 10 * torch.randn(64, generator=torch.Generator().manual_seed(2))
calls = []


def steer(x, hook):
    calls.append(1)
    return x + push


def counted(run):
    """How often the hook ran in a call, and the logits."""
    before = len(calls)
    logits = run()
    return len(calls) - before, logits


changed = []
for model in (HookedSAETransformer(cfg), SAETransformerBridge.boot_transformers(folder, device="cpu")):
    name = type(model).__name__
    places = (hook, "blocks.0.hook_out") if name == "SAETransformerBridge" else (hook,)  # of the bridge's own names

    def run():
        return model(tokens)

    def with_sae():
        return model.run_with_saes(tokens, saes=[sae], use_error_term=True)  # by itself it changes nothing

    def in_context(place, *calls):
        with model.hooks(fwd_hooks=[(place, steer)]):
            return [counted(call)[0] for call in calls]

    with torch.inference_mode():
        plain = model(tokens)
        fresh = in_context(places[-1], run)
        model.add_hook(places[-1], steer, is_permanent=True)
        (n0, steered), (n1, attached), (n2, after) = counted(run), counted(with_sae), counted(run)
        later = []
        for place in places:
            model.add_hook(place, steer)
            later.append(counted(run)[0])
            model.reset_hooks()
            later += in_context(place, run)
        within = in_context(places[-1], run, with_sae, run)
    permanent, shifts = [n0, n1, n2], [(x - plain).abs().max().item() for x in (steered, attached, after)]
    print(f"{name}: before, with and after an SAE a permanent hook ran {permanent} times, one of hooks() {within}")
    print(f"  logits changed by {', '.join(f'{shift:.1g}' for shift in shifts)}; add_hook, hooks() of the fresh model "
          f"{[n0, *fresh]}, of one that had an SAE {later}")
    expected = ([1, 0, 0], [1, 1]) if len(places) == 1 else ([0, 0, 0], [0, 0, 1, 0])
    if permanent != [1, 0, 0] or (within, later) != expected or not shifts[0] > 1 > 1e-3 > max(shifts[1:]):
        changed.append(name)
if changed:
    sys.exit(f"behaviour has changed: {', '.join(changed)}")
EOF
