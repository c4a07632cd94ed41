"""Steering along features: what a language model writes along their directions, at rising strength."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.features.folder import Way
from glp_lens.pipeline.features.inputs import FolderSettings, check_language_model
from glp_lens.pipeline.inputs import OpeningSettings, RunSettings, open_language_model
from glp_lens.settings import option

if TYPE_CHECKING:
    import pandas as pd

    from glp_lens import lm


@dataclass(frozen=True, kw_only=True)
class SteerFeaturesJob(FolderSettings, OpeningSettings, RunSettings):
    """Settings of `features steer`."""

    essentials = ("built", "strength", "prompt", "new_tokens", "model", "device")

    panel = "Data"

    names: tuple[str, ...]
    """Names of features: BLOCK:UNIT, UNIT, or LABEL/ and either, for example sae/1024."""
    way: Way | None = None
    """Which of their directions; by default the model's own (decoder, component, jacobian), else the class mean."""
    strength: tuple[float, ...] = (0.3, 0.6, 1.0)
    """Steering strengths, separated by commas, in median distances of the activations from their mean."""
    prompt: str = "The first thing I noticed"
    """Text to continue."""
    new_tokens: int = option(24, min=1, panel="Run", memory=True)
    """Tokens generated after the prompt."""
    allow_mismatch: bool = option(False, panel="Language model")
    """Steer another language model than the features were built with."""

    def __post_init__(self) -> None:
        """Refuse what would not steer."""
        super().__post_init__()
        if not self.names:
            raise InputError("features steer needs the name of a feature, for example 3:1024")
        if not self.strength or 0 in self.strength:
            raise InputError("features steer needs strengths other than 0: the unsteered text is always there")


@checked
def steer_features(
    settings: SteerFeaturesJob, *, model: lm.Model | None = None, say: Callable[[str], None] = print
) -> dict[str, pd.DataFrame]:
    """Continue a prompt along the direction of features, unsteered and at rising strength, and keep the texts.

    They are in the folder of features from then on: remake its page with glp-lens features page.

    Args:
        model: the language model, where it is open already.
        say: prints a line.

    Returns:
        The texts by label of the model: `feature`, `way`, `strength`, `prompt`, `text`.

    Raises:
        InputError: a folder, feature, direction or language model that cannot be used.
    """
    from glp_lens import lm
    from glp_lens.activations.writer import locked
    from glp_lens.features import FeatureFolder, name_of, parse_name
    from glp_lens.features.steered import check_way, steer

    folder = FeatureFolder.open(settings.built)
    named = [parse_name(each, folder.about.models) for each in settings.names]
    for label in dict.fromkeys(each.label for each, _ in named):
        check_way(folder, folder.model(label), settings.way)
    model = model or open_language_model(settings, settings.device)
    for note in check_language_model(folder, model, lm.identity(model), allow_mismatch=settings.allow_mismatch):
        say(f"note: {note}")
    texts = {}
    with locked(settings.built):
        for about in dict.fromkeys(each for each, _ in named):
            own = [feature for each, feature in named if each == about]
            texts[about.label] = frame = steer(
                folder, about, own, model, way=settings.way, strengths=settings.strength, prompt=settings.prompt,
                new_tokens=settings.new_tokens, allow_mismatch=settings.allow_mismatch, say=say,
            )  # fmt: skip
            for feature, rows in frame.groupby("feature", sort=False):
                say(f"\n{about.label}/{name_of(about, feature)}, {rows['way'].iloc[0]}: {settings.prompt} ...")
                for row in rows.itertuples():
                    say(f"  {row.strength:>4g}  {' '.join(row.text.split()) or '(no text)'}")
    return texts
