"""What a suite compares: a trained model under a label, with the options it is run with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from glp_lens.artifacts import ActivationModel


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
    def setting(self) -> str:
        """The options as the `setting` column of a metric."""
        return ";".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
                        for key, value in self.options.items())  # fmt: skip
