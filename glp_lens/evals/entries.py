"""What a suite compares: trained models under labels, with the options they are run with, and which it can measure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from glp_lens import provenance
from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.evals.results import Setting
from glp_lens.types import Json


@dataclass(frozen=True)
class Entry:
    """One line of a comparison.

    Attributes:
        label: what reports call it, for example `glp sigma=0.1`.
        model: the trained model; a suite asks it for a capability with isinstance.
        options: keyword options for the capability's method, for example `{"sigma": 0.1}`. In probing a tuple
            as `sigma` means the features at all of these noise levels, side by side.
        hook: hook point where its activations are read; None for the model's own, or else the suite's.
        main: whether it takes part in comparisons of pairs; False for a point of a sweep.
    """

    label: str
    model: ActivationModel
    options: dict[str, Any] = field(default_factory=dict)
    hook: str | None = None
    main: bool = True

    @property
    def setting(self) -> Setting:
        """The options as the setting of a metric."""
        return Setting(self.options)

    def identity(self) -> Json:
        """All of it that results depend on, as JSON-like values; this hashes the weights."""
        about = {"label": self.label, "hook": self.hook, "main": self.main, "options": self.options}
        return {**about, "model": self.model.fingerprint()}


def usable(
    entries: Sequence[Entry],
    capability: type | tuple[type, ...],
    source: Callable[[Entry], Json],
    *,
    reserved: Collection[str] = (),
    left_out: str = "",
    allow_mismatch: bool = False,
) -> tuple[list[Entry], list[str]]:
    """The entries that a suite can measure, with a sentence for each that is left out or accepted all the same.

    Args:
        capability: what their models must be able to do, one of several.
        source: provenance of the activations that an entry is measured on.
        reserved: labels that the suite gives to conditions of its own.
        left_out: what is said of an entry without the capability, with places for its `{label}` and `{kind}`.
        allow_mismatch: accept models of another hook point, language model or weight processing.

    Raises:
        InputError: labels that repeat or are reserved, or a model that was trained on other activations.
    """
    labels = [entry.label for entry in entries]
    if len({*labels, *reserved}) < len(labels) + len(reserved):
        others = f" and other than {', '.join(map(repr, reserved))}" if reserved else ""
        raise InputError(f"labels must be unique{others}, got {', '.join(labels)}")
    able: list[Entry] = []
    notes: list[str] = []
    for entry in entries:
        if not isinstance(entry.model, capability):
            notes += [left_out.format(label=entry.label, kind=entry.model.kind)] if left_out else []
            continue
        able.append(entry)
        notes += provenance.check_models({entry.label: entry.model}, source(entry), allow_mismatch=allow_mismatch)
    return able, notes
