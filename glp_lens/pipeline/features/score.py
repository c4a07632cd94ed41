"""Scoring features: how well their automatic labels predict where they are active elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from glp_lens.arguments import checked
from glp_lens.errors import InputError, counted
from glp_lens.pipeline.features.heldout import HeldOutSettings, open_heldout
from glp_lens.pipeline.inputs import ResultSettings
from glp_lens.settings import option

if TYPE_CHECKING:
    from glp_lens import lm
    from glp_lens.artifacts import ActivationModel
    from glp_lens.corpus import Document
    from glp_lens.evals.results import Results
    from glp_lens.features import FeatureFolder
    from glp_lens.features.passages import Watched
    from glp_lens.features.predict import Ints

TABLE = "scores.parquet"


@dataclass(frozen=True, kw_only=True)
class ScoreFeaturesJob(HeldOutSettings, ResultSettings):
    """Settings of `features score`."""

    essentials = ("built", "models", "texts", "documents", "features", "model", "device", "out")

    panel = "Data"

    features: int = option(256, min=0)
    """Features of each model, drawn by seed; 0 for as many as the model with the fewest has."""
    passage: int = option(32, min=2, panel="Language model")
    """Tokens of a passage, in which features are active or not."""
    out: Path = option(Path("results/features"), panel="Run")
    """Folder for the output."""

    def __post_init__(self) -> None:
        """Check each setting, and that a passage fits."""
        super().__post_init__()
        if self.passage >= self.context:
            raise InputError(f"--passage must be under --context, {self.context}: BOS is no part of it")


@checked
def score_features(
    settings: ScoreFeaturesJob,
    *,
    model: lm.Model | None = None,
    texts: Sequence[str | Document] | None = None,
    say: Callable[[str], None] = print,
) -> Results:
    """Measure how well automatic labels predict where features are active in other texts, model by model.

    At equal numbers of features of each model, against labels exchanged between features, with the stability of labels
    over halves of the texts and of features over noise. Writes results.json, metrics.csv and scores.parquet, a row a
    feature, to --out.

    Args:
        model: the language model, where it is open already.
        texts: texts in memory, of which the held-out ones are read, instead of those that the settings name.
        say: prints a line.

    Raises:
        InputError: features, models or texts that cannot be used, or results that are already there.
    """
    from glp_lens import lm
    from glp_lens.features import FeatureFolder, passages, predict
    from glp_lens.files import Kind, write_table

    began = time.monotonic()
    in_memory = model is not None or texts is not None
    with settings.at_work("features score", "results.json", "metrics.csv", TABLE, in_memory=in_memory) as begun:
        folder = FeatureFolder.open(settings.built)
        opened = open_heldout(settings, folder, model, texts)
        drawn, notes = predict.draw(folder, list(opened.trained), settings.features, settings.seed)
        watched = _watched(folder, opened.trained, drawn)
        read = passages.read(
            opened.model, opened.documents, watched, context=settings.context, length=settings.passage,
            seeds=(settings.seed, settings.seed + 1),
        )  # fmt: skip
        results, table = predict.measure(folder, read, watched, drawn, seed=settings.seed)
        results.config = settings.to_json()
        results.data = {
            "language_model": lm.identity(opened.model), "features": folder.about.settings,
            "documents": len(opened.documents), "passages": len(read),
        }  # fmt: skip
        results.failures = notes + opened.notes
        results.seconds = time.monotonic() - began
        begun.saving()
        write_table(settings.out / TABLE, table, Kind("scores of features", "run glp-lens features score again"))
        results.save(settings.out)
    for line in [*_lines(results), *(f"note: {each}" for each in results.failures)]:
        say(line)
    say(f"results: {settings.out / 'metrics.csv'} and {settings.out / TABLE}")
    return results


def _watched(
    folder: FeatureFolder, trained: Mapping[str, ActivationModel], drawn: Mapping[str, Mapping[str, Ints]]
) -> dict[str, Watched]:
    """The features that are drawn for any comparison."""
    from glp_lens.features.passages import Watched

    mine = {label: [models[label] for models in drawn.values() if label in models] for label in trained}
    return {
        label: Watched.of(folder, label, trained[label], np.unique(np.concatenate(features)))
        for label, features in mine.items()
        if features
    }


def _lines(results: Results) -> list[str]:
    """The main numbers, a line for each model."""
    found = {(m.model, m.setting.get("among"), m.setting.get("active"), m.name): m for m in results.metrics}
    lines = []
    for (label, among, how, name), auc in found.items():
        if how == "tenth" and name == "auc":
            chance = found[label, among, how, "auc_exchanged"].value
            overlap, seeds = (
                found[label, among, None, metric].value for metric in ("label_overlap", "seed_correlation")
            )
            lines.append(
                f"{label:12} {among:6} AUC {auc.value:.3f} [{auc.ci_low:.3f}, {auc.ci_high:.3f}], of exchanged labels "
                f"{chance:.3f}; {overlap:.0%} of tokens in labels of both halves; correlation over noise {seeds:.3f} "
                f"({counted(int(auc.setting.number('features')), 'feature')})"
            )
    return lines
