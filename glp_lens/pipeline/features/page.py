"""The page of a folder of features, made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from glp_lens.arguments import checked
from glp_lens.defaults import DEFAULT_PASSAGES
from glp_lens.pipeline.features.inputs import FolderSettings
from glp_lens.pipeline.stages import check_output
from glp_lens.settings import option


@dataclass(frozen=True, kw_only=True)
class PageFeaturesJob(FolderSettings):
    """Settings of `features page`."""

    panel = "Page"
    acts_with: ClassVar[Mapping[str, str]] = {"overwrite": "out"}

    features: int | None = option(None, min=1)
    """Most features of each model, evenly spaced over the numbers of those that are not dead. By default all."""
    examples: int = option(DEFAULT_PASSAGES, min=1)
    """Passages of the highest values and of the lowest; of each fifth of a feature's range a fifth as many."""
    out: Path | None = option(None, panel="Run")
    """File for the page; by default index.html in --folder, which is replaced."""
    overwrite: bool = option(False, panel="Run")
    """Replace the file that is at --out, instead of refusing."""


@checked
def page_features(settings: PageFeaturesJob, *, say: Callable[[str], None] = print) -> Path:
    """Make the page of a folder of features again: one file that opens offline and can be mailed.

    Args:
        say: prints a line.

    Returns:
        The path of the page.

    Raises:
        InputError: no features, damaged ones, or a file that is already there or cannot be written.
    """
    from glp_lens.errors import readable_size
    from glp_lens.features import FeatureFolder
    from glp_lens.features.page import write_page

    folder = FeatureFolder.open(settings.built)
    if settings.out is not None:
        check_output(settings.out, overwrite=settings.overwrite)
    path = write_page(folder, settings.out, features=settings.features, examples=settings.examples)
    say(f"page: {path} ({readable_size(path.stat().st_size)})")
    return path
