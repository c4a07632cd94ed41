"""One section of the report for each suite: what was measured, plots, tables, and how it is to be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from glp_lens.evals.results import Results, metrics_frame
from glp_lens.report import plots
from glp_lens.report.elements import DASH, Cell, Example, Section, Table, find_row, table_of, value_cell, value_cells
from glp_lens.report.labels import Palette, count, display, duration, flops, interval, number, signed
from glp_lens.report.probing import section as probing_section
from glp_lens.report.verdicts import Difference, differences
from glp_lens.types import Json


def sections(results: Sequence[Results], palette: Palette, focus: str = "glp") -> list[Section]:
    """A section for each suite present, in a fixed order; several runs of one suite share a section.

    Args:
        results: of any suites.
        palette: colours of all labels.
        focus: the model whose probes are shown in detail.
    """
    found = []
    for suite, build in _BUILDERS.items():
        runs = [r for r in results if r.suite == suite]
        if runs:
            found.append(build(runs, metrics_frame(m for r in runs for m in r.metrics), palette, focus))
    return found


def training(rows: Sequence[Json], store_rows: int | None = None) -> Table:
    """What each model got: rows seen, passes, parameters, operations, seconds, and its own settings.

    Args:
        rows: one mapping a model; one without `rows_distinct` saw at most the store's rows.
        store_rows: rows of the store, if known.
    """
    shown = ("model", "rows_seen", "rows_distinct", "parameters", "flops", "seconds")
    body = []
    for row in rows:
        seen, distinct = row.get("rows_seen"), row.get("rows_distinct")
        if distinct is None and seen is not None:
            distinct = min(seen, store_rows) if store_rows else None
        passes = f"{seen / distinct:.1f} passes" if seen and distinct and seen > distinct else ""
        rest = "; ".join(f"{k.replace('_', ' ')} {_plain(v)}" for k, v in row.items() if k not in shown)
        body.append(
            [
                Cell(display(str(row.get("model", "")))),
                Cell(count(seen), passes),
                Cell(count(distinct)),
                Cell(count(row.get("parameters"))),
                Cell(flops(row.get("flops"))),
                Cell(duration(row.get("seconds"))),
                Cell(rest or DASH),
            ]
        )
    header = ["Model", "Rows seen", "Distinct rows", "Parameters", "Training FLOPs", "Time", "Settings"]
    caption = "Data and compute of each model. A row is the activation of one token."
    return Table(caption, header, body, prose=("Settings",))


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


_SWEPT = {
    "concept": "Concept (0–2)",
    "fluency": "Fluency (0–2)",
    "harmonic": "Harmonic mean",
    "concept_minus:random": "Concept over random",
    "distinct_2": "Distinct bigrams",
    "nll_own": "NLL, own model",
}
_EXAMPLES = 3


def _steering(runs: Sequence[Results], frame: pd.DataFrame, palette: Palette, _: str) -> Section:
    tables: list[Table] = []
    for run in runs:
        tables += _steering_tables(run.frame(), str(run.config.get("concept", "")), run.extras.get("chosen", {}))
    judges = frame[frame.metric.str.startswith("judge_")].drop_duplicates(["model", "task", "setting", "metric"])
    if len(judges):
        body = [
            [
                Cell(f"{r.model.removeprefix('judge:')} {r.setting.replace('=', ' ')}".strip()),
                Cell(r.metric.removeprefix("judge_").replace("_", " ").replace(":", ", ").replace("auroc", "AUROC")),
                Cell(r.task),
                Cell(number(r.value)),
            ]
            for r in judges.itertuples()
        ]
        caption = (
            "Can the judges be trusted? AUROC on texts that they were not trained on (0.5 is chance), and "
            "how far two judges agree."
        )
        tables.append(Table(caption, ["Judge", "Check", "Concept", "Value"], body))
    notes = [
        "Concept is judged by a sentence-embedding classifier trained on other articles than the direction's, "
        "of the same source; fluency by an n-gram model, cut for texts that repeat themselves. No person and no "
        "large model judged.",
        "The n-gram model knows shuffled words and loops, not nonsense that is plausible word by word. Read the "
        "examples, and the language model's own loss under “all strengths”, beside it.",
        "Strength α is in units of the median activation norm. It is chosen on half of the prompts and "
        "scored on the other half, both ways.",
        "The random direction has the same norm: what it scores for the concept, any disturbance would.",
    ]
    for d in differences(frame, "harmonic"):
        if (d.first, d.second) == ("plain", "random"):
            notes.append(
                f"Control, {d.task}: steering without repair minus a random direction, harmonic mean "
                f"{signed(d.value)} {interval(d.low, d.high, sign=True)}."
            )
    return Section(
        "steering",
        "Steering: concept against fluency",
        "A direction for a topic is added to the activations while the language model writes. Pushed "
        "hard, the text falls apart, because activations leave the region the model knows. A repair puts "
        "each edited activation back among real ones; the question is whether the text then keeps the "
        "topic and stays fluent.",
        [plots.steering_frontier(frame, palette)] if len(frame[frame.metric == "concept"]) else [],
        tables,
        examples=[example for run in runs for example in _examples(run)],
        notes=notes,
    )


def _steering_tables(frame: pd.DataFrame, concept: str, strengths: Json) -> list[Table]:
    """At chosen strengths, paired differences, and all strengths."""
    chosen = frame[frame.setting.str.startswith("alpha=chosen")]
    models = list(dict.fromkeys(chosen.model))
    still = frame[(frame.model == "unsteered") & (frame.setting == "alpha=0")]

    def column(metric: str) -> list[Cell]:
        cells = value_cells([find_row(chosen, model=m, metric=metric) for m in models], highest=True)
        return [*cells, *([value_cell(find_row(still, metric=metric))] if len(still) else [])]

    used = [", ".join(f"{x:g}" for x in dict.fromkeys(strengths.get(m, []))) or DASH for m in models]
    level = frame[frame.metric == "concept_at_fluency"]
    at_fluency = value_cells([find_row(level, model=m) for m in models], highest=True)
    columns = [
        [Cell(display(m)) for m in [*models, *(["unsteered"] if len(still) else [])]],
        [*map(Cell, used), *([Cell(DASH)] if len(still) else [])],
        *(column(metric) for metric in ("concept", "fluency", "harmonic")),
        [*at_fluency, *([Cell(DASH)] if len(still) else [])],
    ]
    header = [
        "Condition",
        "α chosen",
        "Concept (0–2)",
        "Fluency (0–2)",
        "Harmonic mean",
        "Concept at equal fluency",
    ]
    share = level.setting.iloc[0].split(";")[0].replace("fluency>=", "at least ") if len(level) else ""
    caption = f"Steering towards {concept}, each condition at the strength chosen on the other half of the prompts."
    if share:
        caption += f" Last column: the most concept reached with a fluency of {share}."
    tables = [table_of(caption, header, columns)]

    body, seen = [], set()
    for metric, what in (("harmonic", "harmonic mean"), ("concept_at_fluency", "concept at equal fluency")):
        for d in differences(frame, metric):
            if (metric, d.second, d.first) in seen:
                continue
            seen.add((metric, d.first, d.second))
            body.append([_pair(d), Cell(what), Cell(signed(d.value)), Cell(interval(d.low, d.high, sign=True))])
    header = ["Pair", "In", "Difference", "95% interval"]
    tables.append(Table(f"{concept}: paired differences over the same prompts", header, body, folded=True))

    swept = frame[frame.setting.str.contains(r"^alpha=\d")]
    keys = list(dict.fromkeys(zip(swept.model, swept.setting, strict=True)))
    columns = [
        [Cell(display(m)) for m, _ in keys],
        [Cell(s.split(";")[0].removeprefix("alpha=")) for _, s in keys],
    ]
    header = ["Condition", "α"]
    for metric, title in _SWEPT.items():
        found = [find_row(swept, model=m, setting=s, metric=metric) for m, s in keys]
        if any(r is not None for r in found):
            header.append(title)
            columns.append([value_cell(r, sign="minus" in metric) for r in found])
    tables.append(table_of(f"{concept}: all strengths", header, columns, folded=True))
    return tables


def _pair(d: Difference) -> Cell:
    return Cell(f"{display(d.first)} minus {display(d.second)}")


def _examples(run: Results) -> list[Example]:
    """The first prompts' continuations under every condition, by strength."""
    texts = pd.DataFrame(run.extras.get("generations") or run.extras.get("examples") or [])
    if texts.empty or not {"model", "alpha", "prompt", "text"} <= set(texts.columns):
        return []
    found = []
    for prompt in list(dict.fromkeys(texts.prompt))[:_EXAMPLES]:
        own = texts[texts.prompt == prompt]
        steered = own[own.model != "unsteered"]
        alphas = sorted(set(steered.alpha))
        rows = []
        for model in dict.fromkeys(steered.model):
            cells = []
            for alpha in alphas:
                hit = steered[(steered.model == model) & (steered.alpha == alpha)]
                cells.append(_generation(hit.iloc[0]) if len(hit) else Cell(DASH))
            rows.append((display(model), cells))
        still = own[own.model == "unsteered"].text
        found.append(
            Example(
                str(run.config.get("concept", "")),
                prompt,
                str(still.iloc[0]).strip() if len(still) else "",
                [f"α = {alpha:g}" for alpha in alphas],
                rows,
            )
        )
    return found


def _generation(row: pd.Series) -> Cell:
    judged = [f"{name} {number(row[name], 1)}" for name in ("concept", "fluency") if name in row.index]
    return Cell(" ".join(str(row.text).split()), ", ".join(judged))


def _fidelity(runs: Sequence[Results], frame: pd.DataFrame, palette: Palette, _: str) -> Section:
    loss = frame[frame.metric == "delta_nll"]
    models = list(loss.model)
    get: Callable[[str, str], pd.Series | None] = lambda m, metric: find_row(frame, model=m, metric=metric)  # noqa: E731
    scaled = [get(m, "fvu_standardised") for m in models]
    has_scaled = any(r is not None for r in scaled)
    main = table_of(
        "Reconstruction error and its price, on the same rows. Brackets: 95% intervals over documents.",
        [
            "Model",
            "Network calls",
            "FVU",
            *(["FVU, standardised"] if has_scaled else []),
            "Delta LM loss (nats)",
            "Loss recovered",
        ],
        [
            [Cell(display(m)) for m in models],
            [Cell(count(r.value) if (r := get(m, "network_calls")) is not None else DASH) for m in models],
            [value_cell(get(m, "fvu")) for m in models],
            *([[value_cell(r) for r in scaled]] if has_scaled else []),
            [value_cell(get(m, "delta_nll"), sign=True) for m in models],
            [value_cell(get(m, "loss_recovered")) for m in models],
        ],
    )
    body = []
    for d in differences(frame, "delta_nll_matched"):
        fvu = dict(p.split("=", 1) for p in d.setting.split(";") if "=" in p).get("fvu", "nan")
        body.append(
            [
                _pair(d),
                Cell(number(float(fvu))),
                Cell(signed(d.value)),
                Cell(interval(d.low, d.high, sign=True)),
            ]
        )
    tables = [main]
    if body:
        tables.append(
            Table(
                "At equal distortion: the first model read off between its settings at the second one's FVU. "
                "Negative favours the first.",
                ["Pair", "At FVU", "Difference of delta LM loss", "95% interval"],
                body,
            )
        )
    curves = {name: labels for r in runs for name, labels in r.extras.get("curves", {}).items()}
    data, config = runs[0].data, runs[0].config
    clean = find_row(frame, model="clean", metric="nll")
    notes = [
        f"{count(data.get('tokens'))} predicted tokens in {count(config.get('documents'))} held-out "
        f"documents; the untouched model's loss is {number(clean.value if clean is not None else None)} "
        "nats a token.",
        f"{count(data.get('massive_rows_unchanged', 0))} activations with a massive norm passed unchanged "
        "in all conditions, as did BOS.",
        "Loss recovered is 1 for the untouched model and 0 for mean ablation.",
        "Between two settings of a model, its loss is taken as a power of its FVU: the straight line of the "
        "plot. The farther apart the settings, the less that is to be trusted.",
    ]
    if has_scaled:
        notes.append(
            "Models are trained on different losses: GLP and standardised PCA on standardised dimensions, SAE and "
            "plain PCA (“PCA raw”) on raw squared error. So “equal distortion” depends on the space; the matched "
            "comparison uses raw FVU. “FVU, standardised” divides squared errors by each dimension's variance."
        )
    dtype = data.get("model", {}).get("dtype", "float32")
    if dtype != "float32":
        notes.append(f"The language model ran in {dtype}: differences of about 0.01 nats are within its rounding.")
    return Section(
        "fidelity",
        "Fidelity: what does the language model lose?",
        "Every activation of held-out text is replaced by a model's reconstruction of it, and the "
        "language model goes on from there. The rise of its loss says what the reconstruction left out "
        "that mattered. A GLP reconstructs by adding noise and removing it again: its noise level σ is a "
        "knob, and at little noise any model looks good. That is why the error (FVU) stands beside the "
        "loss.",
        [plots.fidelity_scatter(frame, curves, palette)],
        tables,
        notes=notes,
    )


def _density(runs: Sequence[Results], frame: pd.DataFrame, palette: Palette, _: str) -> Section:
    loss = frame[(frame.metric == "flow_loss") & (frame.setting == "sigma=all")].sort_values("value")
    scored = frame[frame.metric == "score_auroc"]
    models = [*loss.model, *(m for m in scored.model if m not in set(loss.model))]

    def column(metric: str, setting: str) -> list[pd.Series | None]:
        return [find_row(frame, model=m, metric=metric, setting=setting) for m in models]

    main = table_of(
        "Held-out flow-matching loss a dimension, and the typicality check: AUROC of telling real "
        "activations from ones shuffled within each dimension (0.5 is chance).",
        ["Model", "Loss", "Exact bound", "Below the bound, %", "Below the Gaussian, %", "Typicality AUROC"],
        [
            [Cell(display(m)) for m in models],
            value_cells(column("flow_loss", "sigma=all"), highest=False),
            [value_cell(r) for r in column("flow_loss_bound", "sigma=all")],
            [value_cell(r, 1) for r in column("below_bound_percent", "sigma=all")],
            [value_cell(r, 1) for r in column("below_gaussian_percent", "sigma=all")],
            value_cells(column("score_auroc", "real vs shuffled"), highest=True),
        ],
    )
    tables, figures = [main], []
    bins = sorted(s for s in set(frame[frame.metric == "flow_loss"].setting) if s != "sigma=all")
    if bins:
        own = frame[frame.metric.isin(["flow_loss", "flow_loss_bound"])]
        columns = [[Cell(s.removeprefix("sigma=").replace("-", DASH)) for s in bins]]
        for model in loss.model:
            rows = [find_row(own, model=model, setting=s, metric="flow_loss") for s in bins]
            columns.append([value_cell(r) for r in rows])
        bounds = own[own.metric == "flow_loss_bound"].groupby("setting").value.min()
        columns.append([Cell(number(bounds.get(s))) for s in bins])
        header = ["Noise level σ", *(display(m) for m in loss.model), "Exact bound"]
        tables.append(table_of("Loss by noise level", header, columns, folded=True))
        figures.append(plots.density_curves(frame, palette))
    data = runs[0].data
    notes = [
        f"{count(data.get('rows'))} held-out activations of {count(data.get('documents'))} documents; "
        "every model was scored on the same activations, noise and noise levels.",
        "The bound, (π/2) mean √λ over the eigenvalues of the standardised training covariance, is the "
        "least loss that any Gaussian can reach. “Below the Gaussian” is paired with the Gaussian's own "
        "loss on these rows, which also pays for the step from training to held-out text.",
        "Predicting 0 costs about 2, and knowing only means and variances π/2 = 1.571.",
    ]
    return Section(
        "density",
        "Density: how well is the distribution known?",
        "A GLP is trained to undo noise. Its loss on held-out activations, noise level by noise level, "
        "says how much of their distribution it has learnt. The fair yardstick is the best that any "
        "Gaussian, which knows all means and covariances but nothing else, could do: that is known "
        "exactly.",
        figures,
        tables,
        notes=notes,
    )


_BUILDERS: dict[str, Callable[[Sequence[Results], pd.DataFrame, Palette, str], Section]] = {
    "probing": probing_section,
    "steering": _steering,
    "fidelity": _fidelity,
    "density": _density,
}
