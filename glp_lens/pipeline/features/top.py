"""Features of one text: which of each model are furthest above their usual value, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glp_lens.arguments import checked
from glp_lens.errors import counted
from glp_lens.pipeline.features.inputs import FolderModelsSettings, open_models
from glp_lens.pipeline.inputs import ContextSettings, OpeningSettings, RunSettings, open_language_model
from glp_lens.settings import option

if TYPE_CHECKING:
    import pandas as pd

    from glp_lens import lm


@dataclass(frozen=True, kw_only=True)
class TopFeaturesJob(FolderModelsSettings, OpeningSettings, ContextSettings, RunSettings):
    """Settings of `features top`."""

    essentials = ("text", "models", "built", "top", "model", "device")

    panel = "Data"

    text: str
    """The text to look at."""
    top: int = option(5, min=1, memory=True)
    """Features of each model at each token, and over the whole text."""
    allow_mismatch: bool = option(False, panel="Language model")
    """Use other models or another language model than the features were built with."""


@checked
def top_features(
    settings: TopFeaturesJob, *, model: lm.Model | None = None, say: Callable[[str], None] = print
) -> pd.DataFrame:
    """Show which features of each model are most above their usual value on a text, token by token.

    A value is compared with the feature's mean over the texts that the features were built on, in its standard
    deviations; a feature that takes both signs counts on either side.

    Args:
        model: the language model, where it is open already.
        say: prints a line.

    Returns:
        A row a model, token and feature, see `glp_lens.features.top.top`.

    Raises:
        InputError: a folder, model or language model that cannot be used, or a text without a token.
    """
    from glp_lens.features import FeatureFolder
    from glp_lens.features.sample import norm_limits
    from glp_lens.features.top import read, top

    folder = FeatureFolder.open(settings.built)
    model = model or open_language_model(settings, settings.device)
    trained, notes = open_models(
        folder, model, settings.models, settings.device, allow_mismatch=settings.allow_mismatch
    )
    hooks = {label: folder.model(label).hook for label in trained}
    limits = norm_limits((hooks[label], each) for label, each in trained.items())
    reading = read(model, settings.text, list(hooks.values()), settings.context, limits)
    if reading.cut:
        notes.append(f"left out: {counted(reading.cut, 'token')} for which --context has no room")
    massive = max(len(reading.tokens) - len(sample) for sample in reading.at.values())
    if massive:
        notes.append(f"left out: {counted(massive, 'token')} of massive activations")
    for note in notes:
        say(f"note: {note}")
    return top(folder, trained, reading, k=settings.top)
