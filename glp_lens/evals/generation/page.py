"""How reports show generation: distances of samples to held-out activations beside their floor, and pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from glp_lens.display.comparisons import Verdict, differences, facing, judge, opening, sentences, shown
from glp_lens.display.elements import Cell, Section, Table, find_row, metric_lines, rows_of, table_of, value_cell
from glp_lens.display.labels import DASH, Palette, Style, count, display, interval, number
from glp_lens.display.overview import Column
from glp_lens.display.plots import INK
from glp_lens.evals.generation.plots import components, dimensions, norms
from glp_lens.evals.results import Results, structured_frame

TITLE = "Generation"
REAL, FITTED = "real", "fitted-gaussian"
CONDITIONS = {
    REAL: Style("other real rows", INK, "*"),
    FITTED: Style("fitted Gaussian", "#b2603c", "P"),
}
_RAW, _STANDARDISED = "activations", "standardised"
_CLOSENESS, _TELLING = "generation (Frechet distance)", "generation (classifier)"


def section(runs: Sequence[Results], frame: pd.DataFrame, palette: Palette, focus: str) -> Section:
    """The section of all runs."""
    frame = frame.assign(space=[setting.get("space") for setting in frame.setting])
    tables = _tables(frame)
    extras = next((run.extras for run in runs if "components" in run.extras), None)
    plots = []
    if extras is not None:
        drawn = [label for label in extras["components"]["points"] if label != "reference"]
        main = [label for label in drawn if label != REAL and " " not in label]
        plots = [
            components(extras, palette, CONDITIONS),
            norms(extras, palette, CONDITIONS, main),
            dimensions(extras, palette, CONDITIONS, main),
        ]
    data, config = runs[0].data, runs[0].config
    notes = [
        f"{count(config.get('samples'))} rows in each set; {count(data.get('rows'))} held-out activations of "
        f"{count(data.get('documents'))} documents, in two halves of documents: one is the reference, the other the "
        "floor and what is reconstructed.",
        f"Outliers: rows with a norm above {number(data.get('max_norm'), 1)}, or not finite, are left out of every "
        f"set; {count(data.get('outlier_rows'))} of the held-out rows were.",
        "Frechet distances of finite sets are too large by about a constant over their number of rows, and more so for "
        "real rows, which depend on each other within a document, than for samples: so a sampler can lie below the "
        "floor. The columns at infinitely many rows have that taken off, on a line in 1/n.",
        "The Frechet distance sees means and covariances only, which a fitted Gaussian has by construction: what tells "
        "it from real rows is the network's AUC. That is 0.5 for samples that cannot be told from real rows; "
        "classifiers are tested on documents that they were not trained on.",
        "Intervals of AUCs are DeLong's over documents; all others leave out one group of documents, and of samples, "
        "at a time (jackknife). An SAE is sampled by drawing each latent by itself from its values on training rows.",
        "Precision is the share of samples within reach of real rows, recall the share of real rows within reach of "
        "samples, by the third nearest neighbour (Kynkaanniemi et al. 2019): read them beside those of real rows.",
    ]
    return Section(
        "generation",
        "Generation: do samples look like activations?",
        "Rows drawn from each model are compared with held-out activations. Every number stands beside the one of "
        "other real rows, which is the best that a sampler can hope for, and that of a Gaussian with the training "
        "rows' means and covariances, which is what a prior must beat to have learnt more than those.",
        plots,
        tables,
        notes=notes,
    )


def _tables(frame: pd.DataFrame) -> list[Table]:
    models = list(frame[frame.metric == "auc_mlp"].model)

    def cells(metric: str, digits: int = 3, models: Sequence[str] = models, **where: object) -> list[Cell]:
        return [value_cell(row, digits) for row in rows_of(frame, models, metric=metric, **where)]

    names = [Cell(display(m, CONDITIONS)) for m in models]
    calls = [Cell(DASH if row is None else count(row.value)) for row in rows_of(frame, models, metric="network_calls")]
    standard, raw = {"space": _STANDARDISED}, {"space": _RAW}
    tables = []
    if models:
        tables = [
            table_of(
                "Samples against held-out activations. Frechet distances are squared; lower is closer, and an AUC of "
                "0.5 cannot be told apart.",
                [
                    ("Sampler", names),
                    ("Network calls", calls),
                    ("AUC, network", cells("auc_mlp")),
                    ("AUC, logistic", cells("auc_logistic")),
                    ("Frechet, standardised", cells("frechet", 2, **standard)),
                    ("at infinitely many rows", cells("frechet_extrapolated", 2, **standard)),
                    ("Frechet, activations", cells("frechet", 1, **raw)),
                    ("at infinitely many rows ", cells("frechet_extrapolated", 1, **raw)),
                ],
            ),
            table_of(
                "The same samples by other distances, in the standardised space.",
                [
                    ("Sampler", names),
                    ("Sliced Wasserstein", cells("sliced_wasserstein")),
                    ("MMD² × 1000", [_thousandfold(row) for row in rows_of(frame, models, metric="mmd2")]),
                    ("Precision", cells("precision")),
                    ("Recall", cells("recall")),
                    ("KS, mean", cells("ks_mean")),
                    ("KS, largest", cells("ks_max")),
                    ("Outlier rows", [
                        Cell(DASH if row is None else f"{count(row.value)} of {count(row.n)}")
                        for row in rows_of(frame, models, metric="outlier_rows")
                    ]),
                ],
            ),
        ]  # fmt: skip
    rebuilt = list(dict.fromkeys(frame[frame.metric == "reconstruction_frechet"].model))
    if rebuilt:
        columns = [("Model", [Cell(display(m, CONDITIONS)) for m in rebuilt])]
        for title, space, digits in (("standardised", standard, 2), ("activations", raw, 1)):
            columns += [
                (f"Frechet, {title}", cells("reconstruction_frechet", digits, rebuilt, **space)),
                (
                    f"{title}, at infinitely many rows",
                    cells("reconstruction_frechet_extrapolated", digits, rebuilt, **space),
                ),
            ]
        tables.append(
            table_of(
                "Reconstructions are not samples: each begins at a real row of the other half, here noised by a GLP "
                "to its default level. The floor is that of the real rows above.",
                columns,
            )
        )
    return tables


def _thousandfold(row: pd.Series | None) -> Cell:
    if row is None:
        return Cell(DASH)
    return Cell(number(1000 * row.value, 2), interval(1000 * row.ci_low, 1000 * row.ci_high, 2))


def columns(_runs: Sequence[Results], frame: pd.DataFrame, _focus: str) -> list[Column]:
    """What a network tells samples by, and their Frechet distance."""
    made = []
    standardised = np.array([setting.get("space") == _STANDARDISED for setting in frame.setting], dtype=bool)
    for title, metric, measure, rows, field, digits in (
        ("Generation: classifier", "auc_mlp",
         "AUC of a network that tells samples from real rows; lower is better, 0.5 is chance",
         frame[frame.metric == "auc_mlp"], _TELLING, 3),
        ("Generation: distance", "frechet_extrapolated",
         "Frechet distance at infinitely many rows, standardised; lower is better",
         frame[(frame.metric == "frechet_extrapolated") & standardised], _CLOSENESS, 1),
    ):  # fmt: skip
        cells = {row.model: value_cell(row, digits) for _, row in rows.iterrows()}
        if cells:
            compared = [d.n for d in differences(frame, metric)] or list(rows.n)
            units = f"{count(min(compared))} documents"
            made.append(Column("generation", title, measure, cells, units, field, digits=digits))
    return made


def verdicts(frame: pd.DataFrame, focus: str) -> list[Verdict]:
    """Whose samples are closer in means and covariances, and whose are harder to tell from real rows."""
    made = []
    for d in facing(differences(frame, "auc_mlp"), focus):
        outcome = judge(d, higher_is_better=False)
        first, second = (find_row(frame, model=label, metric="auc_mlp") for label in (d.first, d.second))
        start = opening(
            outcome, _name(d.first), _name(d.second), "in samples that a network cannot tell from real rows"
        )
        values = [number(None if row is None else row.value) for row in (first, second)]
        sentence = (
            f"{start}: held-out AUC {values[0]} against {values[1]}, difference {shown(d)} over {d.n} documents; lower "
            "is better, and 0.5 is chance."
        )
        floor = find_row(frame, model=REAL, metric="auc_mlp")
        notes = [] if floor is None else [f"Other real rows have {number(floor.value)}"]
        told = sentences(notes)
        made.append(Verdict("generation", outcome, d.first, d.second, sentence, told, _TELLING, visible=d.visible))
    for d in facing(differences(frame, "frechet_extrapolated"), focus):
        if d.setting.get("space") != _STANDARDISED:
            continue
        outcome = judge(d, higher_is_better=False)
        start = opening(outcome, _name(d.first), _name(d.second), "in the means and covariances of samples")
        sentence = (
            f"{start}: the standardised Frechet distances at infinitely many rows differ by {shown(d)} over {d.n} "
            "documents; lower is better."
        )
        made.append(Verdict("generation", outcome, d.first, d.second, sentence, area=_CLOSENESS, visible=d.visible))
    return made


def _name(label: str) -> str:
    return display(label, CONDITIONS)


def text_table(results: Results) -> str:
    """The network's AUC and the extrapolated Frechet distance, a line a sampler."""
    frame = structured_frame(results.metrics)
    frame = frame[[setting.get("space") != _RAW for setting in frame.setting]]
    return metric_lines(frame[frame.metric.isin(["auc_mlp", "frechet_extrapolated"])])
