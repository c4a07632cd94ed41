"""One check of what public functions are called with: each argument is compared with its annotation."""

from __future__ import annotations

import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import suppress
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np

from glp_lens.errors import InputError
from glp_lens.settings import TYPE_NAMES

P = ParamSpec("P")
T = TypeVar("T")

_NOUNS = {"Tensor": "torch.Tensor", "Model": "TransformerLens model", "Projects": "model that can project",
          "Callable": "function", "ActivationModel": "model of activations"}  # fmt: skip
"""What messages call some classes."""
_NAMES_OF_FILES = ("str", "PurePath")
_REMEDIES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("ActivationStore", _NAMES_OF_FILES, "open it with gl.ActivationStore.open"),
    ("ActivationStore", ("Tensor", "ndarray"), "gl.activations.write_store(folder, rows, hook=...) makes one of rows"),
    ("ActivationStore", ("dict",), "it has a store for each hook point, pass one of them"),
    ("Tensor", ("Direction",), "pass its .vector"),
    ("Tensor", ("ndarray", "list", "tuple"), "torch.as_tensor makes one"),
    ("Model", _NAMES_OF_FILES, "open it with gl.open_model"),
    ("Model", ("PreTrainedModel",), "open it with gl.open_model instead"),
    ("ActivationModel", _NAMES_OF_FILES, "open it with gl.load"),
    ("Projects", _NAMES_OF_FILES, "open it with gl.load"),
    ("Sequence", ("str",), "pass a list, also of one"),
    ("Iterable", ("str",), "pass a list, also of one"),
)
"""(class that was expected, classes of what came instead, what to do)."""
_NOISE_LEVEL = ("u", "t", "timestep", "noise_level")
"""What other code calls `sigma`."""


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Compare the arguments of each call with the annotations before the function begins.

    Classes are compared by isinstance, protocols of ours by the names of their members. A whole number is a number,
    and so are NumPy's and tensors without dimensions; shapes are not compared. A text is no sequence of texts.

    Raises:
        InputError: on a call: an argument of another type, or one that the function does not take.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        check(function, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def check(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
    """Refuse what `checked` refuses; arguments may be missing.

    Raises:
        InputError: an argument of another type, or one that the function does not take.
    """
    places, names, hints = _signature(getattr(function, "__func__", function))
    for name in kwargs if names else ():
        if name not in names:
            told = f"it takes {', '.join(names)}"
            if "sigma" in names and name in _NOISE_LEVEL:
                told = "the noise level is sigma, 0 for data and 1 for noise"
            raise InputError(f"{getattr(function, '__qualname__', 'the function')} takes no {name!r}: {told}")
    for name, value in (*zip(places[inspect.ismethod(function) :], args, strict=False), *kwargs.items()):
        # The usual case, a plain class, first: such a call costs about two microseconds more.
        if name in hints and type(value) is not hints[name] and not _fits(value, hints[name]):
            raise InputError(f"{name} must be {_told(hints[name])}, got {_shown(value)}{_remedy(value, hints[name])}")


@functools.lru_cache(512)
def _signature(function: Callable[..., Any]) -> tuple[list[str], list[str], dict[str, Any]]:
    """Names of the arguments that can go by place; all names, none if any name will do; types, where known."""
    parameters = inspect.signature(function).parameters.values()
    places = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    rest = [each.name for each in parameters if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    names = [] if rest else [each.name for each in parameters if each.name not in ("self", "cls")]
    own = inspect.unwrap(function)
    annotations = getattr(own, "__annotations__", {})
    hints: dict[str, Any] = {}
    for name in annotations.keys() - {"return", *rest}:
        with suppress(NameError):  # a type that only type checkers import
            one = types.SimpleNamespace(__annotations__={name: annotations[name]})
            hints |= typing.get_type_hints(one, getattr(own, "__globals__", {}))
    return places, names, hints


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; true where the annotation says nothing that can be seen."""
    cls, parts = _class_and_parts(hint)
    if cls is types.UnionType:
        return any(_fits(value, part) for part in parts)
    if cls is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if cls is Any or not isinstance(cls, type):
        return True
    if getattr(cls, "_is_protocol", False):
        # Asked of the class first: a bridge makes its `hook_dict` anew each time, in milliseconds.
        has = (hasattr(type(value), name) or hasattr(value, name) for name in _members(cls))
        return not cls.__module__.startswith("glp_lens") or all(has)
    if cls in (int, float):
        number = isinstance(value, numbers.Integral if cls is int else numbers.Real) and not isinstance(value, bool)
        return number or getattr(value, "ndim", None) == 0
    return _holds(value, cls, parts) if parts else isinstance(value, (cls, np.bool_) if cls is bool else cls)


def _holds(value: Any, cls: type, parts: tuple[Any, ...]) -> bool:
    """Whether a value is of a class, and what it holds of the types in brackets, as far as it can be seen."""
    if issubclass(cls, Mapping):
        return isinstance(value, Mapping) and all(all(map(_fits, pair, parts)) for pair in value.items())
    if cls is tuple and parts[-1] is not Ellipsis:
        return isinstance(value, tuple | list) and len(value) == len(parts) and all(map(_fits, value, parts))
    if not issubclass(cls, Iterable):
        return isinstance(value, cls)
    if isinstance(value, str | bytes | Mapping):
        return False
    listed = isinstance(value, Sized) and hasattr(value, "__getitem__")  # also pandas' series and NumPy's arrays
    if not listed:
        return cls is not Sequence and isinstance(value, cls)
    # The usual case first: of a hundred thousand texts, each by itself takes a quarter of a second.
    return set(map(type, value)) == {parts[0]} or all(_fits(each, parts[0]) for each in value)


def _class_and_parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """The class that an annotation names, and what stands in its brackets."""
    origin = typing.get_origin(hint)
    cls = types.UnionType if origin is typing.Union else getattr(hint, "array_type", origin or hint)  # jaxtyping's
    return cls, typing.get_args(hint)


@functools.cache
def _members(protocol: type) -> list[str]:
    """Names of what an object of a protocol has, but for what all objects have."""
    classes = [cls for cls in protocol.__mro__ if cls.__module__.startswith("glp_lens")]
    return [name for cls in classes for name in {**vars(cls), **vars(cls).get("__annotations__", {})} if name[0] != "_"]


def _told(hint: Any) -> str:
    """An annotated type in words."""
    cls, parts = _class_and_parts(hint)
    if cls is types.UnionType:
        *others, last = dict.fromkeys(_told(part) for part in parts)
        return f"{', '.join(others)} or {last}" if others else last
    if cls is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if cls is types.NoneType:
        return "None"
    if cls in TYPE_NAMES:
        return TYPE_NAMES[cls]
    if parts and issubclass(cls, Iterable):
        return "a dictionary" if issubclass(cls, Mapping) else "several in a list"
    noun, shape = _NOUNS.get(cls.__name__, cls.__name__), ", ".join(getattr(hint, "dim_str", "").split())
    return f"{_with_article(noun)}{shape and f' ({shape})'}"


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in ('AEFHILMNORSX' if noun.isupper() else 'AEIOUaeiou') else 'a'} {noun}"


def _shown(value: Any) -> str:
    """A value, or its class where it may be long."""
    if value is None or isinstance(value, str | int | float):
        return repr(value)[:60]
    strange = [each for each in value if not isinstance(each, str)] if type(value) in (list, tuple) else ()
    return _with_article(type(value).__name__) + (f" with {_shown(strange[0])}" if strange else "")


def _remedy(value: Any, hint: Any) -> str:
    """What to do instead, as the end of a sentence; empty if it is not known."""
    cls, parts = _class_and_parts(hint)
    wanted = {base.__name__ for each in (parts if cls is types.UnionType else (hint,))
              for base in getattr(_class_and_parts(each)[0], "__mro__", ())}  # fmt: skip
    came = {base.__name__ for base in type(value).__mro__}
    return next((f": {do}" for want, got, do in _REMEDIES if want in wanted and came & {*got}), "")
