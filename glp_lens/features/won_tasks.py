"""Probing tasks that features won: for which tasks a feature is the best of its model, from results of `probe`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from glp_lens.artifacts import ActivationModel
from glp_lens.evals.results import Results, Setting, without_nan
from glp_lens.features.folder import TABLES, FeatureFolder, ModelAbout
from glp_lens.features.sample import options_of

if TYPE_CHECKING:
    import pandas as pd


def won_tasks(
    folder: FeatureFolder, models: Sequence[tuple[ModelAbout, ActivationModel]], results: Results, *, seed: int = 0
) -> list[str]:
    """Write the table `tasks` of each model that was probed, and tell of those that were not.

    A feature won a task if the first noise seed chose it among all of the model's, on training texts. Results belong
    to a model if kind, number of features, noise level and provenance are the same, or of one without provenance, such
    as random features, the seed. Labels do not count.

    Args:
        folder: to write to.
        models: with what describes them.
        results: of `probe`.
        seed: of the folder's job.

    Returns:
        A sentence for each model without results.
    """
    notes = []
    for about, model in models:
        label = _label(about, model, results, seed)
        if label is None:
            notes.append(f"the probing results have no model like {about.label}: it has no tasks")
        else:
            folder.write_table(about, "tasks", _tasks(results, label))
    return notes


def _label(about: ModelAbout, model: ActivationModel, results: Results, seed: int) -> str | None:
    """What the results call a model, its own label first; None if it is not among them."""
    entries = results.config.get("entries", {})
    wanted = {"kind": about.kind, "n_features": about.n_features, **options_of(about)}
    alike = [
        label
        for label, entry in entries.items()
        if {key: entry.get(key) for key in (*wanted, "sigma")} == {"sigma": None, **wanted}
        and _plain(results.data.get("models", {}).get(label)) == _plain(model.provenance)
        and (model.provenance or results.config.get("seed") == seed)
    ]
    return min(alike, key=lambda label: label != about.label, default=None)


def _plain(value: object) -> str:
    return json.dumps(without_nan(value), sort_keys=True, default=str)


def _tasks(results: Results, label: str) -> pd.DataFrame:
    import pandas as pd

    setting = Setting(split="dedup", mode="all")
    one_seed = {
        probe["task"]
        for probe in results.extras.get("probes", ())
        if (probe["model"], probe["setting"]) == (label, str(setting)) and len(probe["features"]) == 1
    }
    of_task = {
        metric.task: (metric.ci_low, metric.ci_high)
        for metric in results.metrics
        if (metric.model, metric.name, metric.setting) == (label, "auc", setting) and metric.task in one_seed
    }
    rows = []
    for best in results.extras.get("best", ()):
        if best["model"] == label:
            # Results of earlier versions have the interval of the mean over noise seeds alone.
            low, high = of_task.get(best["task"], (None, None))
            low, high = best.get("ci_low", low), best.get("ci_high", high)
            rows.append((best["feature"], best["task"], best["auc"], low, high, best["sign"]))
    frame = pd.DataFrame(rows, columns=list(TABLES["tasks"]))
    frame = frame.astype(dict.fromkeys(("auc", "ci_low", "ci_high"), "float64"))
    return frame.sort_values(["feature", "auc"], ascending=[True, False], ignore_index=True)
