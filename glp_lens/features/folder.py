"""A folder of features: what was measured of each feature of some models on one set of texts.

`features.json` says what was measured on what, and is written last. Each model has a folder of its own with the tables
of `TABLES`, of which only `features` and `examples` are always there, and `directions-WAY.safetensors`. The format is
documented in docs/features.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from glp_lens.errors import InputError
from glp_lens.files import Kind, read_json, read_table, read_tensors, write_json, write_table, write_tensors

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from glp_lens.types import Json

ABOUT = "features.json"
BANDS = ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))
"""Parts of the range from 0 to a feature's largest value, from which examples are drawn."""
Way = Literal["decoder", "component", "output weights", "input weights", "jacobian", "class mean"]
"""How a direction of a feature in activation space was found."""
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]*")

TABLES: dict[str, tuple[str, ...]] = {
    "features": (
        "feature", "block", "unit", "mean", "std", "kurtosis", "min", "max", "density", "dead", "dense",
        "histogram_low", "histogram_high", "histogram",
    ),
    "examples": (
        "feature", "group", "rank", "key", "position", "peak", "value", "token_ids", "tokens", "values",
    ),
    "writes": ("feature", "way", "side", "tokens", "logits"),
    "neighbours": ("feature", "by", "model", "other", "value"),
    "prior": (
        "feature", "sigma", "top_value", "stability", "ablation", "jacobian_norm", "jacobian_agreement",
        "jacobian_cosine",
    ),
    "tasks": ("feature", "task", "auc", "ci_low", "ci_high", "sign"),
    "steered": ("feature", "way", "strength", "prompt", "text"),
    "labels": ("feature", "label", "tokens", "log_odds", "context", "context_log_odds"),
    "explanations": (
        "feature", "explanation", "detection", "detection_low", "detection_high", "detection_accuracy", "neighbours",
        "neighbours_low", "neighbours_high", "neighbours_accuracy", "fuzzing", "fuzzing_low", "fuzzing_high",
        "fuzzing_accuracy", "n",
    ),
}  # fmt: skip
"""Columns of each table, which are described in docs/features.md."""


@dataclass(frozen=True)
class ModelAbout:
    """One model of a folder of features.

    Attributes:
        label: what pages call it.
        folder: of its tables, beside features.json.
        kind: of model: glp, sae, pca, neurons, random, raw, gaussian.
        hook: where its activations are read.
        n_features: number of its features.
        blocks: number of equal, consecutive blocks that they come in.
        signed: whether features take both signs, so that low values have examples too.
        sigma: noise level of a GLP's features; None of other models.
        name: folder or Hub id that it was opened from; empty if it was not.
        fingerprint: of its weights.
    """

    label: str
    folder: str
    kind: str
    hook: str
    n_features: int
    blocks: int
    signed: bool
    sigma: float | None = None
    name: str = ""
    fingerprint: str = ""


@dataclass(frozen=True)
class About:
    """What a folder of features holds.

    Attributes:
        models: in the order of pages.
        language_model: as `lm.identity` gives it.
        texts: number of texts.
        tokens: number of tokens that features were computed of.
        corpus: name of the texts.
        settings: of the job.
        versions: of the packages.
        notes: sentences for the reader.
    """

    models: tuple[ModelAbout, ...]
    language_model: Json
    texts: int
    tokens: int
    corpus: str
    settings: Json
    versions: Json
    notes: tuple[str, ...] = ()


_ABOUT_FILE = Kind("features", "delete it and build the features again")


def _kind(table: str) -> Kind:
    return Kind(f"table of features: {table}", "delete it and build the features again")


_DIRECTIONS = Kind("directions of features", "delete it and build the features again")


class FeatureFolder:
    """Reads and writes a folder of features.

    Example:
        >>> folder = FeatureFolder(Path("features"))  # doctest: +SKIP
        >>> folder.table("glp", "features").query("density < 0.01")  # doctest: +SKIP
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: str | Path) -> FeatureFolder:
        """A folder that is complete.

        Raises:
            InputError: there are no features in it, or features.json is damaged.
        """
        folder = cls(Path(path))
        if not (folder.path / ABOUT).is_file():
            raise InputError(f"no features in {path}: {ABOUT} is not there; make them with glp-lens features build")
        _ = folder.about
        return folder

    @cached_property
    def about(self) -> About:
        """What it holds.

        Raises:
            InputError: features.json is missing, damaged or for something else.
        """
        value = read_json(self.path / ABOUT, _ABOUT_FILE)
        try:
            models = tuple(ModelAbout(**{f.name: each[f.name] for f in fields(ModelAbout)}) for each in value["models"])
            about = About(**{f.name: value[f.name] for f in fields(About)} | {"models": models})
            for each in models:
                if not _MODEL.fullmatch(each.folder) or not 0 < each.blocks <= each.n_features:
                    raise ValueError(f"no model has the folder {each.folder!r} or {each.blocks!r} blocks")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.path / ABOUT} holds what no {_ABOUT_FILE.name} do ({error}): {_ABOUT_FILE.remedy}"
            ) from None
        return about

    def model(self, label: str | ModelAbout | None = None) -> ModelAbout:
        """A model by its label; the first without one. What describes a model, while a folder is made, is returned.

        Raises:
            InputError: there is none of that label.
        """
        if isinstance(label, ModelAbout):
            return label
        models = self.about.models
        found = models[0] if label is None else next((each for each in models if each.label == label), None)
        if found is None:
            known = ", ".join(each.label for each in models)
            raise InputError(f"no model {label!r} in {self.path}: there are {known}")
        return found

    def has(self, label: str | ModelAbout, table: str) -> bool:
        """Whether a model has a table."""
        return self._path(label, table).is_file()

    def table(self, label: str | ModelAbout, table: str, features: Sequence[int] | None = None) -> pd.DataFrame:
        """A table of a model.

        Args:
            label: of the model.
            table: its name.
            features: only their rows; by default all.

        Raises:
            InputError: it is missing, damaged, or lacks a column.
        """
        path = self._path(label, table)
        frame = read_table(path, _kind(table), None if features is None else [("feature", "in", list(features))])
        if missing := [name for name in TABLES[table] if name not in frame.columns]:
            raise InputError(f"{path} lacks the column {missing[0]!r}: {_kind(table).remedy}")
        return frame

    def write_table(self, model: ModelAbout, table: str, frame: pd.DataFrame) -> None:
        """Write a table of a model, with the columns of `TABLES` first."""
        columns = [*TABLES[table], *(name for name in frame.columns if name not in TABLES[table])]
        write_table(self.path / model.folder / f"{table}.parquet", frame[columns], _kind(table))

    def ways(self, label: str | ModelAbout) -> list[Way]:
        """The ways for which a model's features have directions, in the order of `Way`."""
        return [way for way in get_args(Way) if self._directions(self.model(label), way).is_file()]

    def directions(self, label: str | ModelAbout, way: Way) -> tuple[Tensor, Tensor]:
        """Directions of a model's features: unit vectors `(n_features, d)`, and the lengths `(n_features,)` they had.

        A feature without one, such as a dead one, has NaN.

        Raises:
            InputError: the file is missing or damaged.
        """
        model = self.model(label)
        found = read_tensors(self._directions(model, way), _DIRECTIONS)
        try:
            vectors, norms = found["vectors"].float(), found["norms"].float()
            if vectors.ndim != 2 or norms.shape != (model.n_features,) or len(vectors) != len(norms):
                raise KeyError("vectors")
        except KeyError:
            path = self._directions(model, way)
            raise InputError(
                f"{path} holds no direction for each of {model.n_features} features: build them again"
            ) from None
        return vectors, norms

    def write_directions(self, model: ModelAbout, way: Way, vectors: Tensor) -> None:
        """Write directions `(n_features, d)` of any length, NaN for none; they are kept in float32."""
        norms = vectors.double().norm(dim=1)
        unit = (vectors.double() / norms.clamp(min=1e-300)[:, None]).float()
        unit[norms == 0] = float("nan")
        write_tensors(self._directions(model, way), {"vectors": unit, "norms": norms.float()}, _DIRECTIONS)

    def finish(self, about: About) -> None:
        """Write features.json, which says that the folder is complete."""
        value = asdict(about)
        value["models"], value["notes"] = list(value["models"]), list(about.notes)
        write_json(self.path / ABOUT, value, _ABOUT_FILE)
        self.__dict__.pop("about", None)

    def _path(self, label: str | ModelAbout, table: str) -> Path:
        return self.path / self.model(label).folder / f"{table}.parquet"

    def _directions(self, model: ModelAbout, way: Way) -> Path:
        return self.path / model.folder / f"directions-{way.replace(' ', '-')}.safetensors"


def name_of(model: ModelAbout, feature: int) -> str:
    """What a feature is called beside others of its model: `3:1024` is unit 1024 of block 3, from 0; else `1024`."""
    if model.blocks == 1:
        return str(feature)
    width = model.n_features // model.blocks
    return f"{feature // width}:{feature % width}"


def parse_name(text: str, models: Sequence[ModelAbout]) -> tuple[ModelAbout, int]:
    """The model and the index of a feature that is named `[LABEL/]UNIT` or `[LABEL/]BLOCK:UNIT`.

    Without a label it is the first model that has blocks where a block is named, else the first.

    Raises:
        InputError: another form, no such model, block or unit.
    """
    label, _, place = text.rpartition("/")
    found = re.fullmatch(r"(?:(\d{1,9}):)?(\d{1,9})", place)
    if not found:
        raise InputError(
            f"a feature is named UNIT, BLOCK:UNIT or LABEL/BLOCK:UNIT, for example glp/3:1024; got {text!r}"
        )
    block, unit = (None if part is None else int(part) for part in found.groups())
    able = [each for each in models if (each.label == label if label else block is None or each.blocks > 1)]
    if not able:
        known = ", ".join(f"{each.label} ({each.kind}, {each.blocks} blocks)" for each in models)
        raise InputError(f"no model has a feature {text!r}: there are {known}")
    model = able[0]
    width = model.n_features // model.blocks
    index = int(unit or 0) if block is None else block * width + int(unit or 0)
    if (block is not None and (block >= model.blocks or int(unit or 0) >= width)) or index >= model.n_features:
        raise InputError(
            f"{model.label} has {model.blocks} block{'s' if model.blocks > 1 else ''} of {width} features, counted "
            f"from 0; got {text!r}"
        )
    return model, index


def folder_names(labels: Sequence[str]) -> list[str]:
    """A name of a folder for each label, no two alike."""
    names: list[str] = []
    for label in labels:
        plain = re.sub(r"[^A-Za-z0-9._=-]+", "-", label).strip("-._=") or "model"
        name, number = plain[:60], 2
        while name in names or name == ABOUT:
            name, number = f"{plain[:60]}-{number}", number + 1
        names.append(name)
    return names
