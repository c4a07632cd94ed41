"""Directions in files: our own, and the plain formats of other packages.

| suffix | holds | written by |
|---|---|---|
| `.safetensors` | a direction with all that is known of it, or bare vectors | `Direction.save`, others |
| `.gguf` | a control vector: `direction.N` of several layers | llama.cpp's cvector-generator, repeng's `export_gguf` |
| `.pt` | `layer_activations` of a `steering_vectors.SteeringVector`, as plain tensors | `torch.save` |
| `.npy` | one vector | `numpy.save` |

Layers are those of blocks, from 0. All three packages add vector N to the output of block N, which is
`blocks.N.hook_resid_post`: llama.cpp keeps `direction.N` at offset N - 1 of its buffer and reads layer `il` from offset
il - 1, so N is `il`, and adds it after attention and MLP have been added to the stream (`build_cvec`); for that reason
it has no place for block 0. repeng trains layer N on `hidden_states[N + 1]` and steers the output of block N;
steering-vectors hooks the N-th `decoder_block`. Other packages' vectors have a length that means something, so files
hold `norm * vector`, and reading keeps the length in `norm`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from glp_lens.arguments import checked
from glp_lens.directions.direction import KEY, Direction, writing
from glp_lens.errors import InputError, first_line, pass_shortage
from glp_lens.files import check_archive, read_tensors, replaced, sync_folder, write_atomic

SUFFIXES = (".safetensors", ".gguf", ".pt", ".npy")
_ARCHITECTURE = "controlvector"
_PREFIX = "direction."
_BLOCK_END = re.compile(r"blocks\.(\d+)\.(hook_resid_post|hook_out)")
_BLOCK_START = re.compile(r"blocks\.(\d+)\.(hook_resid_pre|hook_in)")


@checked
def read(path: str | Path, hook: str | None = None, *, name: str | None = None) -> Direction:
    """One direction from a file of any of the formats above.

    Args:
        path: the file.
        hook: the hook point that it is for: of a file with several layers, it chooses the layer. By default that of the
            file, where there is only one.
        name: what results call it; by default that in the file, or the file's own name.

    Raises:
        InputError: no such file, a damaged one, another kind, no vector of that hook point, or no hook point known.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and _is_own(path):
        own = Direction.load(path)
        if hook is not None and hook != own.hook and (layer_of(hook) is None or layer_of(hook) != layer_of(own.hook)):
            raise InputError(f"{path} is a direction at {own.hook}, asked for {hook}: leave the hook point out")
        return own if name is None else Direction(**{**vars(own), "name": name})
    vectors = read_layers(path)
    layer = None if hook is None else layer_of(hook)
    known = sorted(each for each in vectors if each is not None)
    if None in vectors:  # the file does not say which layer it is of
        if hook is None:
            raise InputError(f"{path} does not say which hook point it is of: pass hook=, or --hook")
        vector = vectors[None]
    elif layer is None and hook is not None:
        raise InputError(f"{path} holds vectors of the outputs of blocks {known}, and {hook} is not one")
    elif layer is None:
        if len(known) > 1:
            raise InputError(f"{path} holds vectors of blocks {known}: choose one by hook='blocks.N.hook_resid_post'")
        layer, vector = known[0], vectors[known[0]]
    elif layer not in vectors:
        raise InputError(f"{path} holds vectors of blocks {known}, none of block {layer} ({hook})")
    else:
        vector = vectors[layer]
    return Direction.of(
        vector,
        hook or f"blocks.{layer}.hook_resid_post",
        name=name or path.stem,
        method="file",
        provenance={"file": path.name},
    )


@checked
def read_layers(path: str | Path) -> dict[int | None, Tensor]:
    """All vectors `(d,)` of a file of another package, float32, by the block after which they are added.

    The key is None where a file holds one vector and does not say of which block.

    Raises:
        InputError: no such file, a damaged one, or one of another kind.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"a direction is read from a file of kind {', '.join(SUFFIXES)}, got {path}")
    if not path.is_file():
        raise InputError(f"direction not found: {path} does not exist")
    readers = {".safetensors": _of_safetensors, ".gguf": _of_gguf, ".pt": _of_torch, ".npy": _of_numpy}
    found = readers[path.suffix](path)
    if not found:
        raise InputError(f"{path} holds no vector: expected one vector (d,), or one for each layer")
    widths = {tuple(vector.shape) for vector in found.values()}
    if len(widths) > 1 or len(next(iter(widths))) != 1:
        raise InputError(f"{path} holds tensors of shape {sorted(widths)}, expected vectors (d,) of one width")
    for vector in found.values():
        if vector.is_complex() or vector.dtype == torch.bool:
            raise InputError(f"{path} holds {vector.dtype} numbers, expected real ones")
        if vector.numel() > vector.untyped_storage().nbytes():
            raise InputError(f"{path} declares {vector.numel():,} numbers and holds fewer: it is damaged")
    return {layer: vector.float() for layer, vector in found.items()}


@checked
def write(path: str | Path, directions: Direction | Sequence[Direction], *, model_hint: str | None = None) -> Path:
    """Write directions in the format that the file's suffix names; see the table above.

    `.gguf` and `.pt` hold several layers, the others one direction. `.pt` is read by
    `SteeringVector(**torch.load(path, weights_only=True))`.

    Args:
        path: the file.
        directions: one, or one for each layer.
        model_hint: what a control vector calls the language model's architecture (`llama`): repeng compares it when it
            adds two vectors. By default the name of the language model.

    Raises:
        InputError: another suffix, several directions of one layer, a hook point that the format has no place for, or
            several directions where one fits, or a file that cannot be written.
    """
    path, given = Path(path), [directions] if isinstance(directions, Direction) else list(directions)
    if path.suffix not in SUFFIXES:
        raise InputError(f"a direction is written to a file of kind {', '.join(SUFFIXES)}, got {path}")
    if path.suffix in (".safetensors", ".npy"):
        if len(given) != 1:
            raise InputError(f"a {path.suffix} file holds one direction, got {len(given)}: write .gguf or .pt")
        if path.suffix == ".safetensors":
            return given[0].save(path)
        content = io.BytesIO()
        np.save(content, _scaled(given[0]).numpy(), allow_pickle=False)
        with writing(path):
            write_atomic(path, content.getvalue())
        return path
    layers = _by_layer(given)
    if path.suffix == ".pt":
        content = io.BytesIO()
        torch.save({"layer_activations": layers, "layer_type": "decoder_block"}, content)
        with writing(path):
            write_atomic(path, content.getvalue())
        return path
    if 0 in layers:
        raise InputError(
            "llama.cpp has no place for a control vector after block 0 (direction.N is added after block N, N from 1): "
            "use a later layer, or write .pt"
        )
    with writing(path):
        _write_gguf(path, layers, model_hint or _name_of_model(given[0]))
    return path


@checked
def layer_of(hook: str) -> int | None:
    """The block whose output a hook point is; None if it is no output of a block."""
    if found := _BLOCK_END.fullmatch(hook):
        return int(found[1])
    found = _BLOCK_START.fullmatch(hook)
    return int(found[1]) - 1 if found and int(found[1]) > 0 else None


def _by_layer(directions: Sequence[Direction]) -> dict[int, Tensor]:
    layers: dict[int, Tensor] = {}
    for each in directions:
        layer = layer_of(each.hook)
        if layer is None:
            raise InputError(
                f"direction {each.name!r} is at {each.hook}, and this format has places for outputs of blocks only "
                "(blocks.N.hook_resid_post): write .safetensors or .npy"
            )
        if layer in layers:
            raise InputError(f"two directions are after block {layer}, and the file holds one a layer")
        layers[layer] = _scaled(each)
    if len({len(vector) for vector in layers.values()}) != 1:
        raise InputError("expected one direction at least, all of one width")
    return layers


def _scaled(direction: Direction) -> Tensor:
    return (direction.norm * direction.vector.double()).float()


def _name_of_model(direction: Direction) -> str:
    name = (direction.provenance.get("model") or {}).get("name")
    return str(name or "unknown")


def _is_own(path: Path) -> bool:
    """Whether a safetensors file is `Direction.save`'s. What cannot be opened is reported by who reads it."""
    try:
        with safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except Exception:
        return False


def _of_safetensors(path: Path) -> dict[int | None, Tensor]:
    tensors = read_tensors(path)
    if len(tensors) == 1 and not re.search(r"\d+$", next(iter(tensors))):
        return {None: next(iter(tensors.values())).squeeze()}
    layers = {name: re.fullmatch(r"(?:.*\D)?(\d+)", name) for name in tensors}
    if not all(layers.values()):
        raise InputError(
            f"{path} holds tensors {sorted(tensors)[:4]}: expected one vector, or names that end in a layer's number"
        )
    vectors: dict[int | None, Tensor] = {int(layers[name][1]): tensor for name, tensor in tensors.items()}  # type: ignore[index]
    if len(vectors) < len(tensors):
        raise InputError(f"{path} holds several tensors of one layer ({sorted(tensors)[:4]}): expected one a layer")
    return vectors


def _of_numpy(path: Path) -> dict[int | None, Tensor]:
    try:
        values = np.lib.format.open_memmap(path, mode="r")  # what a header declares is not reserved before it is there
        if values.dtype.kind not in "fiu":
            raise TypeError(f"of dtype {values.dtype}")
        return {None: torch.from_numpy(values.astype(np.float32)).squeeze()}
    except (ValueError, OSError, EOFError, TypeError) as error:
        raise InputError(
            f"direction cannot be read: {path} is damaged or holds no real numbers ({first_line(error)})"
        ) from None


def _of_torch(path: Path) -> dict[int | None, Tensor]:
    check_archive(path)
    try:
        held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever a damaged or foreign file leads to
        pass_shortage(error)
        raise InputError(
            f"direction cannot be read: {path} is damaged or holds Python objects, which could run code "
            f"({first_line(error, 80)}): of a SteeringVector save "
            "{'layer_activations': vector.layer_activations, 'layer_type': vector.layer_type} with torch.save"
        ) from None
    if isinstance(held, Mapping) and "layer_activations" in held:
        kind = held.get("layer_type", "decoder_block")
        if kind != "decoder_block":
            raise InputError(f"{path} steers {kind!r}, expected the stream after blocks: decoder_block")
        held = held["layer_activations"]
    if isinstance(held, Tensor):
        return {None: held.squeeze()}
    if not isinstance(held, Mapping) or not all(
        isinstance(layer, int) and layer >= 0 and isinstance(vector, Tensor) for layer, vector in held.items()
    ):
        raise InputError(f"{path} holds {type(held).__name__}, expected a tensor, or tensors by number of the layer")
    return {layer: vector.squeeze() for layer, vector in held.items()}


def _of_gguf(path: Path) -> dict[int | None, Tensor]:
    gguf = _import_gguf()
    try:
        reader = gguf.GGUFReader(path)
        field = reader.get_field("general.architecture")
        architecture = None if field is None else field.contents()
        tensors = {tensor.name: tensor for tensor in reader.tensors if tensor.name.startswith(_PREFIX)}
    except Exception as error:  # its reader fails in many ways on a damaged file
        raise InputError(f"direction cannot be read: {path} is damaged or no GGUF file ({first_line(error)})") from None
    if architecture != _ARCHITECTURE:
        raise InputError(f"{path} is a GGUF file of kind {architecture!r}, expected {_ARCHITECTURE!r}")
    found: dict[int | None, Tensor] = {}
    for name, tensor in tensors.items():
        number = name.removeprefix(_PREFIX)
        if not number.isdecimal() or int(number) < 1:
            raise InputError(f"{path} holds {name!r}, expected direction.N with N from 1")
        if tensor.data.dtype.kind != "f":
            raise InputError(f"{path} holds {name!r} of type {tensor.tensor_type.name}, expected F32")
        if int(number) in found:
            raise InputError(f"{path} holds several vectors of block {int(number)}: expected one a layer")
        found[int(number)] = torch.from_numpy(np.array(tensor.data, dtype=np.float32))
    return found


def _write_gguf(path: Path, layers: Mapping[int, Tensor], model_hint: str) -> None:
    gguf = _import_gguf()
    with replaced(path, by_library=True) as temporary:
        writer = gguf.GGUFWriter(temporary, _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", model_hint)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(layers))
        for layer, vector in sorted(layers.items()):
            writer.add_tensor(f"{_PREFIX}{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    sync_folder(path.parent)


def _import_gguf() -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise InputError("control vectors need the gguf package: pip install gguf") from None
    return gguf
