"""Showing: all that a folder of features holds on some of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.pipeline.features.inputs import FolderSettings
from glp_lens.settings import option

if TYPE_CHECKING:
    from glp_lens.features.show import FeatureView


@dataclass(frozen=True, kw_only=True)
class ShowFeaturesJob(FolderSettings):
    """Settings of `features show`."""

    names: tuple[str, ...]
    """Names of features: BLOCK:UNIT, UNIT, or LABEL/ and either, for example sae/1024."""
    examples: int = option(5, min=0)
    """Most passages of each kind."""

    def __post_init__(self) -> None:
        """Check each setting, and that there is a name."""
        super().__post_init__()
        if not self.names:
            raise InputError("features show needs the name of a feature, for example 3:1024")


@checked
def show_features(settings: ShowFeaturesJob) -> list[FeatureView]:
    """Show features: what each is active on, what it writes, which others are like it.

    Returns:
        All that is known of each, in the order asked for.

    Raises:
        InputError: no such folder, model or feature, or a damaged table.
    """
    from glp_lens.features import FeatureFolder, parse_name
    from glp_lens.features.show import view

    folder = FeatureFolder.open(settings.built)
    named = [parse_name(each, folder.about.models) for each in settings.names]
    seen: dict[tuple[str, int], FeatureView] = {}
    for model in dict.fromkeys(model for model, _ in named):
        own = list(dict.fromkeys(feature for other, feature in named if other == model))
        seen |= {(model.label, each.index): each for each in view(folder, model, own)}
    return [seen[model.label, feature] for model, feature in dict.fromkeys(named)]
