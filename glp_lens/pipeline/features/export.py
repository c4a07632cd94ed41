"""Exporting: features in the formats of other tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.features.folder import Way
from glp_lens.pipeline.features.inputs import FolderSettings
from glp_lens.pipeline.inputs import ResultSettings
from glp_lens.pipeline.stages import check_output
from glp_lens.settings import option

if TYPE_CHECKING:
    from glp_lens.features import FeatureFolder, ModelAbout


SUFFIXES = (".safetensors", ".gguf", ".npy", ".pt")
"""Of files that hold one direction."""


@dataclass(frozen=True, kw_only=True)
class ExportFeaturesJob(FolderSettings, ResultSettings):
    """Settings of `features export`."""

    essentials = ("to", "built", "all_of", "way", "out")

    panel = "Data"

    names: tuple[str, ...] = ()
    """Names of features: BLOCK:UNIT, UNIT, or LABEL/ and either; by default all of one model."""
    to: Literal["saedashboard", "neuronpedia", "directions"]
    """Dashboards as SAEDashboard writes them, or as Neuronpedia exports them; or steering directions, as generate and
    other packages take them."""
    all_of: str | None = None
    """Label of the model whose features are exported where none is named; by default the first."""
    way: Way | None = None
    """Which of their directions; by default the model's own (decoder, component, jacobian), else the class mean."""
    out: Path = option(panel="Run")
    """Folder for the output; for the direction of one feature also a .safetensors, .gguf, .pt or .npy file."""
    overwrite: bool = option(False, panel="Run")
    """Replace what is already there."""

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        super().__post_init__()
        if self.names and self.all_of is not None:
            raise InputError("features export takes names of features or --all-of LABEL for all of a model, not both")
        if self.to == "directions" and not self.names:
            raise InputError("features export --to directions needs the names of features, for example 3:1024")
        if self.to != "directions" and self.out.suffix in SUFFIXES:
            raise InputError(f"--to {self.to} writes a folder, got --out {self.out}")
        if self.out.resolve() == self.built.resolve():
            raise InputError(f"--out {self.out} is the folder of features itself: choose another")


@checked
def export_features(settings: ExportFeaturesJob, *, say: Callable[[str], None] = print) -> list[Path]:
    """Write features for other tools: dashboards of SAEDashboard and Neuronpedia, or directions to steer along.

    Args:
        say: prints a line.

    Returns:
        The files.

    Raises:
        InputError: a folder, feature or direction that is not there, or output that already is.
    """
    from glp_lens.features import FeatureFolder, parse_name

    folder = FeatureFolder.open(settings.built)
    named: dict[ModelAbout, list[int]] = {}
    for model, feature in dict.fromkeys(parse_name(each, folder.about.models) for each in settings.names):
        named.setdefault(model, []).append(feature)
    if not settings.names:
        model = folder.model(settings.all_of)
        named = {model: list(range(model.n_features))}
    if settings.to != "directions" and len(named) > 1:
        raise InputError(f"dashboards are of one model, got features of {' and '.join(each.label for each in named)}")
    if settings.to == "directions":
        files = _write_directions(settings, folder, named)
    else:
        files = _write_dashboards(settings, folder, named)
    say(f"{settings.to}: {len(files)} file{'' if len(files) == 1 else 's'} in {settings.out}")
    return files


def _write_directions(
    settings: ExportFeaturesJob, folder: FeatureFolder, named: Mapping[ModelAbout, Sequence[int]]
) -> list[Path]:
    """A file of one direction, or a folder with a file for each."""
    from glp_lens import directions
    from glp_lens.features import name_of
    from glp_lens.features.steered import directions_of

    made = {
        f"{model.folder}-{name_of(model, feature).replace(':', '-')}.safetensors": direction
        for model, features in named.items()
        for feature, direction in zip(features, directions_of(folder, model, features, settings.way), strict=True)
    }
    if settings.out.suffix not in SUFFIXES:
        with settings.at_work("features export", *made) as begun:
            begun.saving()
            return [directions.write(settings.out / name, direction) for name, direction in made.items()]
    if len(made) > 1:
        raise InputError(f"{settings.out} holds one direction: pass a folder as --out for those of several features")
    check_output(settings.out, overwrite=settings.overwrite)
    return [directions.write(settings.out, direction) for direction in made.values()]


def _write_dashboards(
    settings: ExportFeaturesJob, folder: FeatureFolder, named: Mapping[ModelAbout, Sequence[int]]
) -> list[Path]:
    """The files of one model's features, without batches of a longer export that was there."""
    from glp_lens.features.export import write_dashboards
    from glp_lens.features.steered import check_way

    assert settings.to != "directions"
    if len(named) > 1:
        raise InputError(f"dashboards are of one model, got features of {' and '.join(each.label for each in named)}")
    ((model, features),) = named.items()
    if settings.way is not None:
        check_way(folder, model, settings.way)
    first = "batch-0.json" if settings.to == "saedashboard" else "features/batch-0.jsonl.gz"
    with settings.at_work("features export", first) as begun:
        begun.saving()
        files = write_dashboards(folder, model, features, settings.out, settings.to, way=settings.way)
        if settings.overwrite:
            for path in settings.out.glob("**/batch-*.json*"):
                if path not in files:
                    path.unlink()
    return files
