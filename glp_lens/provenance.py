"""Provenance: which activations a model was trained on, and whether those at hand match.

All functions read the JSON of `ActivationStore.provenance()`, which every trained model keeps. Much of it may be
missing, as in models of other libraries: what is not known on both sides is not a mismatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

from glp_lens import lm
from glp_lens.errors import InputError, counted
from glp_lens.types import Json

REMEDY = "use the language model and hook point it was trained on"

_PROCESSING = {"fold_ln": "folded", "center_writing_weights": "centred"}
"""Arguments of TransformerLens's `from_pretrained_no_processing`, off by default, by their names in
`lm.weight_processing`."""
_UNNAMED = ("", "none", "unnamed", "custom")
_ALIASES = {"gpt2-small": "gpt2"}
"""TransformerLens's own names, as published SAEs give them, where the last part differs from the Hub's."""

Model = TypeVar("Model")


class _Trained(Protocol):
    """What a check reads of a trained model, besides `provenance` where it has one."""

    @property
    def d_in(self) -> int: ...
    @property
    def hook(self) -> str | None: ...


def trained_on(model: _Trained) -> Json:
    """The provenance of the activations that a model was trained on, in the format of `ActivationStore.provenance`."""
    store: Json = dict(getattr(model, "provenance", {}).get("store") or {})
    hooks: Json = store.pop("hooks", {})  # what a multi-layer prior knows of each of its hook points
    return {**store, **hooks.get(model.hook or "", {}), "hook": model.hook, "d_in": model.d_in}


def weight_processing(opened_with: Mapping[str, object]) -> str:
    """The weight processing of a language model that was opened with these `model_from_pretrained_kwargs`."""
    return "+".join(name for key, name in _PROCESSING.items() if opened_with.get(key)) or "raw"


def opened_with(trained: Json) -> Json:
    """How to open a language model so that it gives the activations that a model was trained on.

    Returns:
        Arguments of `HookedTransformer.from_pretrained_no_processing`; empty for raw weights, or if not known.
    """
    names = str((trained.get("model") or {}).get("weight_processing")).split("+")
    return {key: True for key, name in _PROCESSING.items() if name in names}


def bound(model: Model, hook: str) -> Model:
    """The model to use at a hook point: of a multi-layer prior, its view of that layer.

    Raises:
        InputError: a layer that the prior was not trained on.
    """
    at = getattr(model, "at", None)
    return at(hook) if at and getattr(model, "layers", ()) else model


def same_hook(trained: Json, source: Json, hook: str) -> bool:
    """Whether a model was trained at one of the hook points that activations were collected at.

    Args:
        trained: what is known of the model's activations.
        source: what is known of those at hand, with `hook_names` by hook point.
        hook: which of their hook points.
    """
    return lm.same_point(_names(trained), [hook, *(source.get("hook_names") or {}).get(hook, ())])


def here(model: lm.Model, hook: str, identity: Json | None = None) -> Json:
    """What would be known of activations collected from a language model at a hook point.

    Args:
        model: the language model.
        hook: the hook point.
        identity: `lm.identity(model)`, where the caller knows it already: making it reads all weights.
    """
    identity = identity or lm.identity(model)
    names = lm.names_of(model, hook) if hook in model.hook_dict else [hook]
    width = identity["model"]["d_model"] if any(lm.RESIDUAL.fullmatch(name) for name in names) else None
    return {"hook": hook, "hook_names": names, "d_in": width, **identity}


def mismatches(trained: Json, at_hand: Json) -> list[str]:
    """How two provenances differ, one phrase each, in the order hook point, width, weight processing, model.

    The number format of the language model is no mismatch, nor are folded norms on the residual stream: the activations
    are the same up to rounding. Hashes of the weights are compared only within one class and number format, since both
    change them. Otherwise names are, by their last part and without the owner, since one model has a name on the Hub,
    in TransformerLens and as a folder; of one name, another revision or a quantised copy is another model.
    """
    phrases = []
    a, b = trained.get("hook"), at_hand.get("hook")
    if a and b and not lm.same_point(_names(trained), _names(at_hand)):
        phrases.append(f"at {a} (here {b})")
    if _differ(trained.get("d_in"), at_hand.get("d_in")):
        phrases.append(f"on width {trained['d_in']} (here {at_hand['d_in']})")
    one, other = trained.get("model") or {}, at_hand.get("model") or {}
    a, b = one.get("weight_processing"), other.get("weight_processing")
    if _differ(*(_effect(processing, [*_names(trained), *_names(at_hand)]) for processing in (a, b))):
        phrases.append(f"with {a} weights (here {b})")
    return phrases + _model_mismatch(trained, at_hand)


def check(subject: str, trained: Json, at_hand: Json, *, remedy: str = REMEDY, allow_mismatch: bool = False) -> str:
    """Refuse provenances that do not fit together.

    Args:
        subject: how the line begins, for example `glp was trained`.
        remedy: what to do about it.
        allow_mismatch: accept everything but another width, which no model can be used with.

    Returns:
        The accepted mismatches as a sentence for the results; empty without any.

    Raises:
        InputError: they differ.
    """
    phrases = mismatches(trained, at_hand)
    if not phrases:
        return ""
    line = f"{subject} {', '.join(phrases)}"
    if _differ(trained.get("d_in"), at_hand.get("d_in")):
        raise InputError(f"{line}: {remedy}")
    if not allow_mismatch:
        raise InputError(f"{line}: {remedy}, or pass allow_mismatch=True (--allow-mismatch)")
    return f"{line}: accepted by allow_mismatch"


def check_models(models: Mapping[str, _Trained], at_hand: Json, *, allow_mismatch: bool = False) -> list[str]:
    """`check` for models by label.

    Returns:
        A sentence for each accepted mismatch, and the `cautions` of autoencoders of sae-lens, which no check covers.
    """
    notes = []
    for label, model in models.items():
        trained = trained_on(model)
        accepted = check(f"{label} was trained", trained, at_hand, allow_mismatch=allow_mismatch)
        notes += [accepted] if accepted else []
        notes += [f"{label} {caution}" for caution in trained.get("cautions") or []]
    return notes


def check_finetuning(model: _Trained, at_hand: Json, *, allow_mismatch: bool = False) -> str:
    """Refuse to train a model on at another hook point, width, weight processing or depth of the language model.

    Other weights of the language model, or another one of that shape, are what finetuning is for.

    Returns:
        What was accepted, as `check`.

    Raises:
        InputError: they differ.
    """
    return check(
        "this prior was trained",
        _place(trained_on(model)),
        _place(at_hand),
        remedy="finetune it on activations of the same hook point",
        allow_mismatch=allow_mismatch,
    )


def _place(trained: Json) -> Json:
    """The hook point, width, depth and weight processing, whichever the language model."""
    about = trained.get("model") or {}
    model = {key: about.get(key) for key in ("weight_processing", "n_layers")}
    return {**{key: trained.get(key) for key in ("hook", "hook_names", "d_in")}, "model": model}


def check_use(model: _Trained, language_model: lm.Model, hook: str, *, allow_mismatch: bool = False) -> None:
    """Refuse to use a trained model on activations of another hook point, width, weight processing or model.

    Raises:
        InputError: the language model has no such hook point, or what `check` refuses.
    """
    lm.check_hook(language_model, hook)
    at_hand = here(language_model, hook)
    check(f"this {type(model).__name__} was trained", trained_on(model), at_hand, allow_mismatch=allow_mismatch)


def check_edit(language_model: lm.Model, hook: str, *, allow_mismatch: bool = False) -> list[str]:
    """Refuse a hook point where an edit does not reach the residual stream, or say that it was accepted.

    Raises:
        InputError: no such hook point, or edits there do not reach the stream.
    """
    lm.check_hook(language_model, hook)
    try:
        lm.check_edit(language_model, hook)
    except InputError as error:
        if not allow_mismatch:
            raise
        return [f"{str(error).partition(':')[0]}: accepted by allow_mismatch"]
    return []


def describe(model: _Trained) -> str:
    """One line on what a model was trained on, as far as it is known."""
    store = trained_on(model)
    training: Json = getattr(model, "provenance", {}).get("training") or {}
    rows = training.get("rows_distinct") or training.get("rows_seen")
    corpus, about = (store.get("corpus") or {}).get("name"), store.get("model") or {}
    amount = f"{counted(rows, 'row')} of width {model.d_in}" if rows else f"rows of width {model.d_in}"
    processing = about.get("weight_processing")
    known = (
        amount + (f" of {corpus}" if corpus else ""),
        " ".join(part for part in (about.get("name"), store["hook"]) if part),
        f"{processing} weights" if processing else "",
    )
    return f"{type(model).__name__} trained on {', '.join(part for part in known if part)}"


def _model_mismatch(trained: Json, at_hand: Json) -> list[str]:
    one, other = trained.get("model") or {}, at_hand.get("model") or {}
    hashes = trained.get("weights"), at_hand.get("weights")
    comparable = None not in hashes and all(
        one.get(key) is not None and one[key] == other.get(key) for key in ("class", "dtype", "weight_processing")
    )
    if comparable and hashes[0] == hashes[1]:
        return []
    (name, copy), (name_here, copy_here) = _name(one), _name(other)
    full, full_here = one.get("name"), other.get("name")
    if name and name_here and name != name_here:
        return [f"on {full} (here {full_here})"]
    for key, what in (("n_layers", "layers"), ("d_model", "dimensions")):
        if _differ(one.get(key), other.get(key)):
            return [f"on a model of {one[key]} {what} (here {other[key]})"]
    if comparable:
        return [f"on other weights of {full} (hash {hashes[0]}, here {hashes[1]})"]
    if copy and copy_here and copy != copy_here:
        quantised = ", and quantised weights are other weights" if "GGUF" in copy + copy_here else ""
        return [f"on {full} (here {copy_here}{quantised})"]
    return []


def _name(model: Json) -> tuple[str, str]:
    """The last part of a model's name, and which copy of its weights it is; empty where not known."""
    full = str(model.get("name") or "")
    path, _, copy = full.removesuffix(")").partition(" (")
    last = path.rstrip("/").rsplit("/", 1)[-1].lower()
    last = "" if last in _UNNAMED else _ALIASES.get(last, last)
    return last, copy if copy != "local folder" else ""


def _names(known: Json) -> list[str]:
    """All known names of the hook point; none where it is not known."""
    hook, names = known.get("hook"), known.get("hook_names") or ()
    return [] if hook is None else list(names) if hook in names else [hook]


def _effect(processing: str | None, names: list[str]) -> object:
    """How weight processing changes activations: on the residual stream, only centring does."""
    residual = any(lm.RESIDUAL.fullmatch(name) for name in names)
    return "centred" in processing if residual and processing is not None else processing


def _differ(one: object, other: object) -> bool:
    return None not in (one, other) and one != other
