"""Tiny random models of many architectures, what transformers computes with them, and the table of what is covered.

`python -m tests.architectures` writes docs/coverage.md from what `cover` finds for each; the tests find the same.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import glp_lens as gl
from glp_lens import lm
from glp_lens.errors import InputError
from tests.conftest import save_tokenizer, tiny_texts

_B = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
_M = {**_B, "intermediate_size": 40}
_G = {**_M, "num_key_value_heads": 2}
_H = {**_G, "head_dim": 8}
_N = {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2}
_OPT = {**_B, "ffn_dim": 40, "word_embed_proj_dim": 24}
_FALCON: dict[str, Any] = {**_B, "new_decoder_architecture": False}


@dataclass(frozen=True)
class Architecture:
    """How to make a tiny model: names of classes in transformers, settings, and what is special about it."""

    settings: dict[str, Any]
    special: str
    model: str = ""
    config: str = ""


ARCHITECTURES = {
    "Llama": Architecture(_G, "RMS norms, grouped queries"),
    "Llama with biases": Architecture({**_G, "attention_bias": True, "mlp_bias": True}, "biases in attention and MLP"),
    "Mistral": Architecture({**_G, "sliding_window": 6}, "sliding window"),
    "Mixtral": Architecture({**_G, "num_local_experts": 4}, "mixture of experts"),
    "Qwen2": Architecture(_G, "biases of queries, keys, values"),
    "Qwen2Moe": Architecture({**_G, **_MOE, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
                             "mixture of experts, one shared"),
    "Qwen3": Architecture(_H, "norms of queries and keys"),
    "Qwen3Moe": Architecture({**_H, **_MOE, "moe_intermediate_size": 16}, "mixture of experts"),
    "Gemma": Architecture(_H, "scaled embedding, 1 + weight in norms"),
    "Gemma2": Architecture({**_H, "sliding_window": 6, "query_pre_attn_scalar": 8}, "norms after the sublayers too"),
    "Gemma3": Architecture({**_H, "sliding_window": 6, "query_pre_attn_scalar": 8}, "local and global layers",
                           "Gemma3ForCausalLM", "Gemma3TextConfig"),
    "Olmo": Architecture(_G, "norms without weights"),
    "Olmo2": Architecture(_G, "norms after the sublayers only"),
    "Olmoe": Architecture({**_G, **_MOE}, "mixture of experts"),
    "Granite": Architecture({**_G, "residual_multiplier": 0.22}, "scaled residuals"),
    "Phi": Architecture({**_G, "hidden_size": 32, "partial_rotary_factor": 0.5}, "parallel blocks"),
    "Phi3": Architecture(_G, "joint projections"),
    "StableLm": Architecture({**_G, "hidden_size": 64}, "partial rotary positions"),
    "Starcoder2": Architecture({**_G, "sliding_window": 6}, "LayerNorm with grouped queries"),
    "SmolLM3": Architecture(_G, "layers without positions"),
    "Cohere": Architecture(_G, "parallel blocks, interleaved rotary positions"),
    "Nemotron": Architecture(_G, "squared ReLU"),
    "Glm": Architecture({**_H, "partial_rotary_factor": 0.5}, "interleaved partial rotary positions"),
    "DeepseekV3": Architecture(
        {**_M, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
         "topk_group": 1, "moe_intermediate_size": 16, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
         "qk_nope_head_dim": 4, "v_head_dim": 6, "first_k_dense_replace": 1}, "latent attention"),
    "GptOss": Architecture({**_H, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
                           "attention sinks, mixture of experts"),
    "GPT2": Architecture(_N, "LayerNorm, learned positions", "GPT2LMHeadModel"),
    "GPTBigCode": Architecture(_N, "one head of keys and values"),
    "GPTJ": Architecture({**_N, "rotary_dim": 4}, "parallel blocks"),
    "CodeGen": Architecture({**_N, "n_embd": 32, "rotary_dim": 4}, "parallel blocks, joint projections"),
    "GPTNeo": Architecture({"hidden_size": 24, "num_layers": 4, "num_heads": 4, "window_size": 6,
                            "attention_types": [[["global", "local"], 2]], "max_position_embeddings": 64},
                           "local and global layers"),
    "GPTNeoX": Architecture({**_M, "use_parallel_residual": True}, "parallel blocks"),
    "GPTNeoX, sequential": Architecture({**_M, "use_parallel_residual": False}, "LayerNorm, rotary positions"),
    "OPT": Architecture(_OPT, "positions with an offset"),
    "OPT, norms after": Architecture({**_OPT, "do_layer_norm_before": False}, "LayerNorm after the sublayers"),
    "XGLM": Architecture({"d_model": 24, "ffn_dim": 40, "num_layers": 3, "attention_heads": 4,
                          "max_position_embeddings": 64}, "sinusoidal positions"),
    "Bloom": Architecture({"hidden_size": 24, "n_layer": 3, "n_head": 4}, "ALiBi"),
    "Falcon": Architecture({**_FALCON, "alibi": False, "multi_query": True, "parallel_attn": True}, "parallel blocks"),
    "Falcon with ALiBi": Architecture(
        {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}, "ALiBi"),
    "Mpt": Architecture({"d_model": 24, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}, "ALiBi"),
    "Mamba": Architecture({"hidden_size": 24, "num_hidden_layers": 3, "state_size": 4}, "state space"),
    "RecurrentGemma": Architecture({"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
                                    "num_attention_heads": 4, "num_key_value_heads": 1, "lru_width": 32,
                                    "attention_window_size": 8}, "recurrent, no cache"),
    "Rwkv": Architecture({"hidden_size": 24, "attention_hidden_size": 24, "num_hidden_layers": 3,
                          "context_length": 64, "intermediate_size": 40}, "recurrent, no cache"),
    "Jamba": Architecture({**_G, **_MOE, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                           "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_d_conv": 4, "mamba_dt_rank": 4,
                           "use_mamba_kernels": False}, "attention and state space layers"),
    "Bert": Architecture(_M, "reads both ways", "BertForMaskedLM"),
    "OpenAIGPT": Architecture(_N, "calls no hook points of blocks", "OpenAIGPTLMHeadModel"),
    "T5": Architecture({"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_heads": 4}, "encoder-decoder",
                       "T5ForConditionalGeneration"),
    "Bart": Architecture({"d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
                          "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
                          "max_position_embeddings": 64}, "encoder-decoder", "BartForConditionalGeneration"),
}  # fmt: skip
"""Settings of the classes of that name in transformers; what follows a comma or a word is a variant."""

EQUAL = 1e-4
"""Difference of activations over their spread that rounding may make in float32."""
DOC = Path(__file__).parents[1] / "docs" / "coverage.md"
_DOC = """# Language models and autoencoders that are covered

By opening a tiny random model of each architecture as a TransformerBridge beside transformers; `python -m
tests.architectures` makes this page, and `tests/integration/test_architectures.py` finds the same in CI. Real models
are compared too, when they are opened for the first time; what computes something else is refused.

Versions: {versions}.

- *rows*: rows that `collect` keeps after a block equal transformers' own in float32.
- *generation*: with keys and values `cached`, or running the `whole text` at each step, where the model has no cache or
  the cached steps compute something else. Texts generated with a projection at each token equal those of transformers
  with the same projection and no cache, token by token, in both ways.
- *blocks*: what transformers calls the list of blocks, as `save_released` and `push --format released` write it.

| architecture | special | rows | generation | blocks | |
|---|---|---|---|---|---|
{rows}

`backend="hooked"` opens Llama-architecture folders, and refuses those with biases, which transformer-lens drops. An
edit changes the residual stream at `hook_resid_pre` and `hook_resid_post` of a block, and at what is added to it,
`hook_attn_out` and `hook_mlp_out`. `hook_resid_mid` is on the stream in a HookedTransformer only; on a bridge it is the
input of the norm before the MLP, so hooks and suites refuse to edit there.

## Sparse autoencoders of sae-lens

Metadata that change what the numbers mean are in [probing.md](probing.md#autoencoders-of-others).

| architecture | |
|---|---|
{saes}
"""
LAYER, NEW = 1, 5
HOOK = f"blocks.{LAYER}.hook_resid_post"


def make(name: str, folder: Path) -> Path:
    """A tiny model with a word tokenizer as a Hugging Face folder, norms and biases that do something."""
    import transformers

    about = ARCHITECTURES[name]
    base = name.replace(",", " ").split()[0]
    words = save_tokenizer(folder)
    ids = {"vocab_size": words, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = getattr(transformers, about.config or f"{base}Config")(initializer_range=0.3, **about.settings, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, about.model or f"{base}ForCausalLM")(config)
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 and not any(part in key for part in ("time_", "A_log", "dt_bias")):
                parameter.data += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


class Reference:
    """The same model in transformers alone."""

    def __init__(self, name: str, folder: Path, blocks: str) -> None:
        import transformers

        base = name.replace(",", " ").split()[0]
        kind = getattr(transformers, ARCHITECTURES[name].model or f"{base}ForCausalLM")
        self.model: Any = kind.from_pretrained(folder, dtype=torch.float32).eval()
        self.block = self.model.get_submodule(f"{blocks}.{LAYER}")

    @torch.no_grad()
    def run(self, ids: list[int], edit: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[Tensor, Tensor]:
        """Rows `(pos, d)` after the block, and logits `(pos, vocabulary)` once `edit` has changed them."""
        seen: list[Tensor] = []

        def hook(_module: Any, _args: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            seen.append(x[0])
            new = edit(x[0])[None]
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = self.block.register_forward_hook(hook)
        logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        handle.remove()
        return seen[0], logits

    def continued(self, prompt: list[int], project: Callable[[Tensor], Tensor]) -> list[int]:
        """The likeliest tokens, each found from the whole text, if rows from the prompt's last on are projected."""
        ids, start = list(prompt), len(prompt) - 1
        for _ in range(NEW):
            _, logits = self.run(ids, lambda x: torch.cat([x[:start], project(x[start:])]))
            ids.append(int(logits[-1].argmax()))
        return ids


@dataclass(frozen=True)
class Covered:
    """What works with an architecture.

    Attributes:
        refused: the line it is refused with, if it is.
        blocks: what transformers calls the list of its blocks.
        rows: largest difference of collected rows from transformers', over their spread.
        generation: `cached`, `whole text` at each step, or `none`.
        texts: whether texts generated with a projection are those of transformers, with a cache and without.
    """

    refused: str = ""
    blocks: str = ""
    rows: float = float("nan")
    generation: str = ""
    texts: tuple[bool, ...] = ()


def cover(name: str, folder: Path) -> Covered:
    """Open a model, collect from it, and generate from it with a projection, beside transformers."""
    make(name, folder / "model")
    try:
        model = lm.open_model(str(folder / "model"), dtype="float32")
        store = gl.collect(model, tiny_texts(40), hooks=[HOOK], out=folder / "acts", context=24, dtype="float32",
                           massive=None, progress=lambda _: None)  # fmt: skip
    except InputError as refused:
        return Covered(str(refused))
    assert isinstance(store, gl.ActivationStore)
    blocks = store.provenance()["model"]["blocks"]
    reference = Reference(name, folder / "model", blocks)
    want = torch.cat([reference.run(ids)[0][1:] for ids in lm.to_ids(model, tiny_texts(40), 24)])
    x = store.rows()
    rows = float((x - want).norm(dim=1).max() / (want - want.mean(0)).norm(dim=1).mean())
    pca = gl.PCA.fit(store, n_components=9)
    prompts = [lm.to_ids(model, [text], 6)[0] for text in tiny_texts(3, seed=7)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cached = lm.caches_keys_and_values(model, torch.tensor(prompts[:1]))
            steps: list[int] = []

            def count(x: Tensor, *, hook: Any = None) -> Tensor:
                steps.append(x.shape[1])
                return x

            hooks = [pca.projection_hook(model=model), ("blocks.0.hook_resid_post", count)]
            texts = [lm.generate(model, torch.tensor([p]), NEW, hooks=hooks)[0].tolist() for p in prompts]
    except InputError as refused:
        return Covered(str(refused), blocks, rows, "none")
    whole = []
    for prompt in prompts:
        with model.hooks(fwd_hooks=[pca.projection_hook(model=model)]), torch.no_grad():
            text = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, stop_at_eos=False,
                                  use_past_kv_cache=False, return_type="tokens", verbose=False)  # fmt: skip
        whole.append(text[0].tolist())
    truth = [reference.continued(prompt, pca.project) for prompt in prompts]
    generation = "cached" if cached and steps[1] == 1 else "whole text"
    return Covered("", blocks, rows, generation, (texts == truth, whole == truth))


def reason(refused: str) -> str:
    """Why something is refused, without its name and what to do about it."""
    line = re.sub(r"^(model|autoencoder) \S+( opened with \S+)? ", "", refused.replace(", opened", " opened"))
    return line.partition(": ")[0].replace("|", "/")


def row(name: str, covered: Covered) -> str:
    """A line of the table of language models."""
    rows = "equal" if covered.rows < EQUAL else "no"
    blocks = f"`{covered.blocks}`" if covered.blocks else ""
    what = "generation refused" if covered.blocks else "refused"
    note = f"{what}: {reason(covered.refused)}" if covered.refused else ""
    return f"| {name} | {ARCHITECTURES[name].special} | {rows} | {covered.generation or 'no'} | {blocks} | {note} |"


def autoencoders(folder: Path) -> dict[str, str]:
    """What opening an autoencoder of each architecture of sae-lens ends in: empty, or the line it is refused with."""
    from sae_lens.registry import SAE_CLASS_REGISTRY

    refusals = {}
    for name, (kind, config) in sorted(SAE_CLASS_REGISTRY.items()):
        settings = {"d_in": 12, "d_sae": 20, "d_out": 12, "k": 3, "bottleneck_factor": 2, "n_heads": 2}
        if "transcoder" in name:
            settings["apply_b_dec_to_input"] = False
        sae = kind(config(**{key: size for key, size in settings.items() if key in config.__dataclass_fields__}))
        sae.save_model(folder / name)
        try:
            gl.SAE.from_sae_lens(folder / name)
            refusals[name] = ""
        except InputError as refused:
            refusals[name] = "refused: " + reason(str(refused)).replace(", from None to None", "")
    return refusals


def versions() -> str:
    """What the tables are of."""
    return ", ".join(f"{name} {version(name)}" for name in ("transformer-lens", "transformers", "sae-lens"))


def main() -> None:
    """Write docs/coverage.md."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [row(name, cover(name, Path(folder) / str(i))) for i, name in enumerate(ARCHITECTURES)]
        saes = [f"| {name} | {said or 'works'} |" for name, said in autoencoders(Path(folder) / "saes").items()]
    DOC.write_text(_DOC.format(versions=versions(), rows="\n".join(rows), saes="\n".join(saes)), encoding="utf-8")


if __name__ == "__main__":
    main()
