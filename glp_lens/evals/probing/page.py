"""How reports show probing: which model's features read concepts, at which setting, and which features they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from glp_lens.display.comparisons import (
    Difference,
    Outcome,
    Verdict,
    differences,
    facing,
    judge,
    opening,
    sentences,
    shown,
    value_of,
)
from glp_lens.display.elements import (
    Cell,
    Part,
    Section,
    Table,
    find_row,
    rows_of,
    table_of,
    value_cell,
    value_cells,
)
from glp_lens.display.labels import (
    DASH,
    MINUS,
    Palette,
    count,
    family,
    interval,
    number,
    p_value,
)
from glp_lens.display.overview import Column
from glp_lens.evals.probing import plots
from glp_lens.evals.probing.plots import CONDITIONS, display
from glp_lens.evals.probing.settings import DENSE, MEAN
from glp_lens.evals.results import Results, Setting, structured_frame
from glp_lens.types import Json

__all__ = ["CONDITIONS", "columns", "section", "text_table", "verdicts"]

VIEWS = tuple(Setting(split=split, mode=mode) for mode in ("paper", "all") for split in ("dedup", "official"))
"""Settings of single features, the strictest first, which verdicts speak of."""
_Column = tuple[str, list[Cell]]
TITLE = "Sparse probing"
_KEY = ["model", "task", "setting", "metric", "other"]
_PAIRS = 6
"""Most pairs in one open table; of more, those with the model in focus stand alone."""
_COLUMNS = 6
"""Most numbers of features in a table of curves."""
_TEXTS = 3
"""Texts shown of a feature."""
_POOLING = {
    "last": "the last token",
    "mean": "the mean over tokens",
    "max": "the maximum over tokens",
    "all": "every token",
}


@dataclass(frozen=True)
class _Probing:
    """One or several runs of the suite, as the parts of the section read them.

    Attributes:
        runs: their results.
        frame: all metrics, each once.
        focus: the model, or family of models, whose probes are shown in detail.
    """

    runs: Sequence[Results]
    frame: pd.DataFrame
    focus: str

    @cached_property
    def entries(self) -> Json:
        """The runs' `config["entries"]`."""
        return {label: entry for run in self.runs for label, entry in run.config.get("entries", {}).items()}

    @cached_property
    def tasks(self) -> Json:
        """The runs' `data["tasks"]`."""
        return {name: task for run in self.runs for name, task in run.data.get("tasks", {}).items()}

    @cached_property
    def means(self) -> pd.DataFrame:
        """Metrics over all tasks."""
        return self.frame[self.frame.task == MEAN]

    @cached_property
    def auc(self) -> pd.DataFrame:
        """Mean test AUCs."""
        return self.means[self.means.metric == "auc"]

    @cached_property
    def views(self) -> list[Setting]:
        """Settings of single features that were measured, the strictest first."""
        present = set(self.auc.setting)
        return [view for view in VIEWS if view in present]

    @property
    def split(self) -> Setting:
        """The split of the strictest view, which plots and lesser tables show."""
        return _split(self.views[0])

    @property
    def widest(self) -> Setting:
        """The strictest view of those that choose among all features."""
        return next((view for view in self.views if view.get("mode") == "all"), self.views[0])

    @cached_property
    def labels(self) -> list[str]:
        """All models of single features, the best first."""
        order = self.auc[self.auc.setting == self.views[0]].sort_values("value", ascending=False).model
        return [
            *order,
            *(m for m in dict.fromkeys(self.auc[self.auc.setting.isin(self.views)].model) if m not in set(order)),
        ]

    @cached_property
    def main(self) -> list[str]:
        """Models that are compared in pairs, the best first."""
        return [m for m in self.labels if self.entries.get(m, {}).get("main", True)] or self.labels

    @cached_property
    def focused(self) -> str:
        """The label of the model in focus; without it, the best model."""
        own = [m for m in self.main if m == self.focus] + [m for m in self.main if family(m) == self.focus]
        return (own or self.main)[0]

    @cached_property
    def common(self) -> Setting | None:
        """The setting at which models are compared in pairs with equally many features, if they are."""
        return next((d.setting for d in differences(self.means, "auc") if _is_equal(d.setting, self.split)), None)

    @property
    def top(self) -> int:
        """Candidates of `mode=paper`."""
        return int(self.runs[0].config.get("max_features", 512))

    def view_name(self, view: Setting) -> str:
        split = "repeats removed" if view.get("split") == "dedup" else "official split"
        return f"{split}, {f'top {self.top} features' if view.get('mode') == 'paper' else 'all features'}"

    def features(self, model: str) -> float:
        """How many features a model has; NaN if nothing tells."""
        known = self.entries.get(model, {}).get("n_features")
        if known:
            return float(known)
        rows = self.frame[(self.frame.metric == "n_candidates") & (self.frame.model == model)]
        return float(rows[rows.setting.isin([v for v in VIEWS if v.get("mode") == "all"])].value.max())

    def dense(self) -> float | None:
        """Mean AUC of the logistic regression on all raw dimensions."""
        row = find_row(self.auc, model=DENSE, setting=self.split)
        return None if row is None else float(row.value)

    def by_task(self, setting: Setting) -> pd.DataFrame:
        """`auc` rows of single tasks."""
        frame = self.frame
        return frame[(frame.metric == "auc") & (frame.setting == setting) & (frame.task != MEAN)]

    def curves(self, setting: Setting, key: str, models: Sequence[str]) -> dict[str, pd.DataFrame]:
        """Mean AUCs of each model by the number under a key besides a setting; `dense` counts as infinite."""
        rows = self.auc.assign(at=[_level(own, setting, key) for own in self.auc.setting])
        rows = rows.dropna(subset=["at", "value"])
        by_model = {model: rows[rows.model == model].set_index("at").sort_index() for model in models}
        return {model: own for model, own in by_model.items() if len(own)}


def _is_equal(setting: Setting, split: Setting) -> bool:
    """Whether models have equally many features at a setting of a split."""
    return setting.get("mode") == "equal" and _split(setting) == split


def _split(setting: Setting) -> Setting:
    return Setting(split=setting.get("split"))


def _level(setting: Setting, base: Setting, key: str) -> float:
    if setting.get(key) is None or setting.without(key) != base:
        return math.nan
    return math.inf if setting.get(key) == DENSE else setting.number(key)


def section(runs: Sequence[Results], frame: pd.DataFrame, palette: Palette, focus: str = "glp") -> Section:
    """The section of all probing runs; parts without results are left out."""
    p = _Probing(runs, frame.drop_duplicates(_KEY), focus)
    if not p.views:
        return Section("probing", "Probing", "No probing task could be scored.")
    drawn = {view: p.view_name(view) for view in p.views if _split(view) == p.split}
    parts = [_tasks(p, palette), _sweeps(p, palette), _counts(p, palette), _sparse(p, palette), _features(p)]
    return Section(
        "probing",
        "Probing: does one feature hold one concept?",
        "For each task, every model may use a single feature to tell two classes of text apart: a "
        "meta-neuron of the GLP, a latent of the SAE, a component of PCA, or a raw dimension. A model "
        "whose single features read more concepts has taken the activations apart in a more meaningful "
        "way.",
        [plots.means(p.auc[p.auc.model.isin(p.main)], drawn, p.dense(), palette)],
        [_means(p), *_pairs(p), *_selection(p)],
        parts=[part for part in parts if part is not None],
        notes=_notes(p),
    )


def columns(runs: Sequence[Results], frame: pd.DataFrame, focus: str) -> list[Column]:
    """Mean AUC of single features in the strictest view."""
    p = _Probing(runs, frame.drop_duplicates(_KEY), focus)
    if not p.views:
        return []
    rows = dict(zip(p.main, rows_of(p.auc, p.main, setting=p.views[0]), strict=True))
    units = max((int(row.n) for row in rows.values() if row is not None), default=0)
    return [
        Column(
            "probing",
            "Probing",
            "mean AUC of one feature; higher is better",
            {label: value_cell(row) for label, row in rows.items()},
            _families(units),
            "probing",
        )
    ]


def _families(n: float) -> str:
    return f"{count(n)} task {'family' if n == 1 else 'families'}"


def verdicts(frame: pd.DataFrame, focus: str) -> list[Verdict]:
    """One verdict a model, on the strictest view, with the number of other views that agree.

    A winner is named only if Holm's adjustment over all pairs agrees. What happens at equal feature counts is said
    where it is another verdict.
    """
    frame = frame[frame.task == MEAN]
    pairs = facing(differences(frame, "auc"), focus)
    view = next((v for v in VIEWS if any(d.setting == v for d in pairs)), None)
    p_values = {(r.model, r.other, r.setting): r.value for r in frame[frame.metric == "p_holm"].itertuples()}

    def p_of(d: Difference) -> float:
        turned = p_values.get((d.second, d.first, d.setting), math.nan)
        return float(p_values.get((d.first, d.second, d.setting), turned))

    def outcome_of(d: Difference) -> Outcome:
        return judge(d, higher_is_better=True, p_adjusted=p_of(d))

    made = []
    for d in (d for d in pairs if d.setting == view):
        outcome, p = outcome_of(d), p_of(d)
        names = display(d.first), display(d.second)
        means = [number(value_of(frame, model=m, setting=view, metric="auc")) for m in (d.first, d.second)]
        sentence = (
            f"{opening(outcome, *names, 'in reading concepts from one feature')}: mean test AUC {means[0]} against "
            f"{means[1]}, difference {shown(d)} over {_families(d.n)}."
        )
        notes = []
        if math.isfinite(p):
            told = p_value(p)
            notes.append(f"Holm-adjusted p {told}" if "<" in told else f"Holm-adjusted p = {told}")
        same = [o for o in pairs if (o.first, o.second) == (d.first, d.second) and o.setting != view]
        others = [o for o in same if o.setting in VIEWS]
        if others:
            agree = sum(outcome_of(o) == outcome for o in others)
            notes.append(f"{agree} of {len(others)} other views (split, candidate features) give the same verdict")
        equal = next((o for o in same if _is_equal(o.setting, _split(d.setting))), None)
        if equal is not None and outcome_of(equal) != outcome:
            features = count(equal.setting.number("features"))
            turn = opening(outcome_of(equal), *names, f"at equal feature counts ({features} each)")
            notes.append(f"{turn}: difference {shown(equal)}")
        made.append(Verdict("probing", outcome, d.first, d.second, sentence, sentences(notes), visible=d.visible))
    return made


def text_table(results: Results) -> str:
    """Mean AUCs of a probing run as plain text with aligned columns, the best model first.

    One line a model: number of features, AUC with its interval by split and candidates, optimism (validation minus
    test AUC, all features). Columns that were not measured are left out.
    """
    p = _Probing([results], structured_frame(results.metrics).drop_duplicates(_KEY), "glp")
    if not p.views:
        return "no probing task could be scored"
    header, columns = ["model", "features"], [list(p.labels), [_plain_count(p.features(m)) for m in p.labels]]
    dense = any(find_row(p.auc, model=DENSE, setting=_split(v)) is not None for v in p.views)
    if dense:
        columns[0].append(DENSE)
        columns[1].append("-")
    for view in sorted(p.views, key=lambda v: (v.get("split") != "dedup", v.get("mode") != "paper")):
        whole = view.get("mode") == "all"
        header.append(f"{view.get('split')}, {'all' if whole else f'top {p.top}'}")
        rows = rows_of(p.auc, p.labels, setting=view)
        if dense:
            rows.append(find_row(p.auc, model=DENSE, setting=_split(view)) if whole else None)
        columns.append(["-" if r is None else _plain_interval(r) for r in rows])
    optimism = rows_of(p.means, p.labels, setting=p.widest, metric="optimism")
    if any(r is not None for r in optimism):
        header.append("optimism")
        columns.append(["-" if r is None else f"{r.value:+.3f}" for r in optimism] + ["-"] * dense)
    widths = [max(map(len, [name, *column])) for name, column in zip(header, columns, strict=True)]

    def line(texts: Sequence[str]) -> str:
        first, *rest = (
            t.ljust(w) if i == 0 else t.rjust(w) for i, (t, w) in enumerate(zip(texts, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    tasks = p.frame[p.frame.task != MEAN].task.nunique()
    title = f"mean test AUC of the best single feature over {tasks} task{'s' if tasks != 1 else ''}"
    families = p.auc[p.auc.setting == p.views[0]].n.max()
    if families > 1:
        title += f" in {families:.0f} families, with 95% intervals over families"
    return "\n".join([title, "", line(header), *(line(texts) for texts in zip(*columns, strict=True))])


def _plain_count(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else "-"


def _plain_interval(row: pd.Series) -> str:
    ends = f" [{row.ci_low:.3f}, {row.ci_high:.3f}]" if math.isfinite(row.ci_low + row.ci_high) else ""
    return f"{row.value:.3f}{ends}"


def _of(p: _Probing, models: Sequence[str]) -> list[_Column]:
    """Columns that name models and tell their numbers of features."""
    sizes = [Cell(count(p.features(m))) for m in models]
    return [("Model", [Cell(display(m)) for m in models]), ("Features (K)", sizes)]


def _in_views(p: _Probing, models: Sequence[str]) -> list[_Column]:
    """The same, and mean AUCs in every view."""
    auc = [(p.view_name(v).capitalize(), value_cells(rows_of(p.auc, models, setting=v), highest=True)) for v in p.views]
    return [*_of(p, models), *auc]


def _means(p: _Probing) -> Table:
    """Mean AUC of the compared models in every view, and on how many tasks each is the best."""
    columns = _in_views(p, p.main)
    families = p.auc[(p.auc.setting == p.views[0])].n.max()
    caption = f"Mean test AUC over {_families(families)}, with 95% intervals over families."
    scores = p.by_task(p.views[0]).pivot(index="task", columns="model", values="value").reindex(columns=p.main).dropna()
    if len(scores) > 1 and len(p.main) > 1:
        wins = scores.eq(scores.max(axis=1), axis=0)
        shares = wins.div(wins.sum(axis=1), axis=0).sum()
        cells = [Cell(number(shares[m], 0 if shares[m] == round(shares[m]) else 1)) for m in p.main]
        columns.append((f"Best on, of {count(len(scores))} tasks", cells))
        caption += f" Last column: {p.view_name(p.views[0])}; ties are shared."
    return table_of(caption, columns)


def _pairs(p: _Probing) -> list[Table]:
    """Paired differences in the strictest view and at equal feature counts; many pairs are folded."""
    rows, header = _pair_rows(p)
    if not rows:
        return []
    caption = (
        f"Paired differences of mean AUC ({p.view_name(p.views[0])}); p by sign flips over families, Holm-adjusted."
    )
    if any("Wins" in name for name in header):
        caption += " Wins: share of tasks on which the first model is ahead, ties half."
    if len(rows) <= _PAIRS:
        return [Table(caption, header, [cells for _, cells in rows])]
    own = [cells for mine, cells in rows if mine]
    rest = [cells for mine, cells in rows if not mine]
    tables = [Table(caption, header, own)] if own else []
    return [
        *tables,
        Table("Paired differences between the other models" if own else caption, header, rest, folded=True),
    ]


def _pair_rows(p: _Probing) -> tuple[list[tuple[bool, list[Cell]]], list[str]]:
    """Rows of the table of pairs, each with whether the model in focus is in it, turned so that it comes first."""
    equal = p.common
    settings = [p.views[0], *([equal] if equal else [])]
    has_wins = (p.means.metric == "win_rate").any()
    header = ["Pair"]
    for setting in settings:
        names = ["difference", *(["wins"] if has_wins else []), "p"]
        start = f"At {count(setting.number('features'))} features: " if setting == equal else ""
        header += [f"{start}{name}" if start or name == "p" else name.capitalize() for name in names]
    body: list[tuple[bool, list[Cell]]] = []
    for d in (d for d in differences(p.means, "auc") if d.setting == p.views[0]):
        turned = d.second == p.focused
        first, second = (d.second, d.first) if turned else (d.first, d.second)
        cells = [Cell(f"{display(first)} minus {display(second)}")]
        for setting in settings:
            gap, rate, p_holm = (
                find_row(p.means, model=d.first, setting=setting, metric=metric, other=d.second)
                for metric in ("auc_diff", "win_rate", "p_holm")
            )
            cells.append(value_cell(_turned(gap, 0.0) if turned else gap, sign=True))
            if has_wins:
                cells.append(_percent(_turned(rate, 1.0) if turned else rate))
            cells.append(Cell(p_value(None if p_holm is None else p_holm.value)))
        body.append((p.focused in (first, second), cells))
    return sorted(body, key=lambda row: not row[0]), header


def _turned(row: pd.Series | None, total: float) -> pd.Series | None:
    """A metric row of A against B, seen from B, where the two sum to `total`."""
    if row is None:
        return None
    turned = row.copy()
    turned[["value", "ci_low", "ci_high"]] = [total - row.value, total - row.ci_high, total - row.ci_low]
    return turned


def _percent(row: pd.Series | None) -> Cell:
    if row is None:
        return Cell(DASH)
    return Cell(f"{number(100 * row.value, 0)}%", interval(100 * row.ci_low, 100 * row.ci_high, 0))


def _selection(p: _Probing) -> list[Table]:
    """What choosing among many features costs: validation against test, and against uninformative features."""
    titles = {
        "auc_validation": "Validation AUC",
        "auc_null": "… of as many useless features",
        "auc": "Test AUC",
        "optimism": "Optimism (validation minus test)",
        "auc_oracle": "Picked on test: not comparable",
    }
    rows = p.means[(p.means.setting == p.widest) & p.means.model.isin(p.labels)]
    present = set(rows.metric)
    if not present & {"optimism", "auc_null"}:
        return []
    columns = _of(p, p.labels)
    for metric, title in titles.items():
        if metric in present:
            own = rows_of(rows, p.labels, metric=metric)
            columns.append((title, [value_cell(r, sign=metric == "optimism") for r in own]))
    who = "All models and noise levels" if len(p.labels) > len(p.main) else "All models"
    caption = f"{who}, and what choosing among many features costs ({p.view_name(p.widest)})"
    return [table_of(caption, columns, folded=True)]


def _tasks(p: _Probing, palette: Palette) -> Part | None:
    rows = p.by_task(p.views[0])
    if rows.empty:
        return None
    dense = p.by_task(p.split)
    dense = dense[dense.model == DENSE]
    table = pd.concat([rows, dense]).pivot(index="task", columns="model", values="value")
    table = table.reindex(columns=[*p.main, *([DENSE] if len(dense) else [])]).dropna(how="all")
    families = {name: str(task.get("family", name)) for name, task in p.tasks.items()}
    figures = [plots.heat_map(table, families)]
    if (rows.model == p.focused).any():
        by_task = dense.set_index("task").value.to_dict()
        figures.append(plots.dot_plot(rows, p.main, p.focused, by_task, palette))
    return Part("Task by task", f"All of this part: {p.view_name(p.views[0])}.", figures)


def _sweeps(p: _Probing, palette: Palette) -> Part | None:
    """AUC against noise level, of models that were probed at several, and against block."""
    view = p.views[0]
    single: dict[str, dict[float, str]] = {}
    joined: dict[str, float] = {}
    for label in p.labels:
        sigma, stem = p.entries.get(label, {}).get("sigma"), label.split(" sigma=")[0]
        row = find_row(p.auc, model=label, setting=view)
        if isinstance(sigma, int | float):
            single.setdefault(stem, {})[float(sigma)] = label
        elif isinstance(sigma, list | tuple) and row is not None:
            joined[label] = float(row.value)
    noise = {}
    for stem, labels in single.items():
        rows = {s: find_row(p.auc, model=m, setting=view) for s, m in sorted(labels.items())}
        curve = pd.DataFrame({s: r for s, r in rows.items() if r is not None}).T
        if len(curve) > 1:
            noise[stem] = curve.astype({"value": float, "ci_low": float, "ci_high": float})
    among_all = p.split | Setting(mode="all")
    layers = p.curves(among_all, "layer", [m for m in p.labels if m not in joined])
    by_sigma = sorted(layers, key=lambda m: float(p.entries.get(m, {}).get("sigma") or 0))
    layers = {m: layers[m] for m in by_sigma if len(layers[m]) > 1}
    if not noise and not layers:
        return None
    swept = {m for labels in single.values() for m in labels.values()} | set(joined)
    peers = p.auc[(p.auc.setting == view) & p.auc.model.isin(set(p.main) - swept)].set_index("model").value.to_dict()
    tables = []
    if noise or joined:
        models = [m for m in p.labels if m in swept]
        tables.append(table_of("Mean test AUC at each noise level", _in_views(p, models), folded=True))
    if layers:
        blocks = sorted({b for rows in layers.values() for b in rows.index})
        columns = [("Block", [Cell(f"{b:g}") for b in blocks])]
        for label, rows in layers.items():
            own = [rows.loc[b] if b in rows.index else None for b in blocks]
            columns.append((display(label), value_cells(own, highest=True)))
        caption = "Mean test AUC of the best feature of each denoiser block"
        tables.append(table_of(caption, columns, folded=True))
    figure = plots.sweeps(noise, layers, joined, peers, p.focused, palette)
    titles = [t for t, present in (("noise level", noise), ("block of the denoiser", layers)) if present]
    leads = [f"Noise levels: {p.view_name(view)}."] if noise else []
    leads += [f"Blocks: {p.view_name(among_all)} of the block."] if layers else []
    return Part(f"Which {' and which '.join(titles)} read best?", " ".join(leads), [figure], tables)


def _counts(p: _Probing, palette: Palette) -> Part | None:
    curves = p.curves(p.split | Setting(mode="equal"), "features", p.main)
    if not any(len(rows) > 1 for rows in curves.values()):
        return None
    common = int(p.common.number("features")) if p.common else None
    grid = sorted({k for rows in curves.values() for k in rows.index})
    step = (len(grid) - 1) / (_COLUMNS - 1)
    chosen = {grid[round(i * step)] for i in range(_COLUMNS)} if len(grid) > _COLUMNS else set(grid)
    shown = sorted(chosen | ({float(common)} & set(grid) if common else set()))
    columns = [("Features", [Cell(display(m)) for m in curves])]
    for k in shown:
        own = [rows.loc[k] if k in rows.index else None for rows in curves.values()]
        columns.append((count(k), value_cells(own, highest=True)))
    caption = "Mean test AUC when every model chooses among equally many of its features"
    return Part(
        "Is it the number of features?",
        "",
        [plots.feature_counts(curves, common, p.focused, palette)],
        [table_of(caption, columns, folded=True)],
    )


_RANKINGS = {
    Setting(): (
        "probing_sparse",
        "sae-probes' ranking",
        "divided by each feature's mean non-zero magnitude, as in sae-probes",
    ),
    Setting(rank="difference"): (
        "probing_sparse_difference",
        "the GLP paper's ranking",
        "as it is, as in the GLP paper",
    ),
}
"""How a k-sparse probe's features are chosen: part of the setting, to name of the plot, short words and long ones."""


def _sparse(p: _Probing, palette: Palette) -> Part | None:
    figures, tables = [], []
    for ranking, (name, short, words) in _RANKINGS.items():
        setting = p.split | Setting(probe="sparse") | ranking
        curves = p.curves(setting, "k", p.main)
        if not curves:
            continue
        figures.append(plots.sparse(name, words, curves, p.dense(), p.focused, palette))
        ks = sorted({k for rows in curves.values() for k in rows.index})
        for metric, title in (("auc", "test AUC"), ("accuracy", "accuracy"), ("f1", "F1 score")):
            rows = p.means[p.means.metric == metric]
            columns = [("Features in the probe (k)", [Cell(display(m)) for m in curves])]
            for k in ks:
                size = f"{k:g}" if math.isfinite(k) else DENSE
                own = rows_of(rows, curves, setting=setting | Setting(k=size))
                columns.append((size if math.isfinite(k) else "all", value_cells(own, highest=True)))
            if any(cell.text != DASH for _, column in columns[1:] for cell in column):
                tables.append(table_of(f"Sparse probes, {short}: mean {title}", columns, folded=True))
    lead = (
        "A concept may be spread over a few features. What several together reach says whether any one held it. Which "
        "features go in depends on how they are ranked: dividing by the magnitude suits sparse features, and in dense "
        "ones favours those that one text in a thousand excites."
    )
    return Part("Several features at once", lead, figures, tables) if figures else None


def _features(p: _Probing) -> Part | None:
    """Each task's best feature: those of the model in focus with the texts that excite them, then of all models."""
    best = [row for run in p.runs for row in run.extras.get("best") or []]
    if not best:
        return None
    tables = []
    own = sorted((row for row in best if row["model"] == p.focused), key=lambda row: -float(row["auc"] or 0))
    if own:
        body = [
            [
                Cell(row["task"]),
                _feature_cell(row, p.tasks),
                Cell(number(row["auc"]), f"validation {number(row.get('auc_validation'))}"),
                Cell("", passages=_passages(row, p.tasks)),
            ]
            for row in own
        ]
        told = "Excited most by"
        caption = f"{display(p.focused)}: the best feature of each task, and the training texts that excite it most"
        header = ["Task", "Feature", "Test AUC", told]
        tables.append(Table(caption, header, body, folded=True, prose=(told,)))
    table = {(row["task"], row["model"]): row for row in best}
    models = [m for m in p.main if any(row["model"] == m for row in best)]
    if len(models) > 1 or not own:
        rows = [
            [Cell(task), *(_best_cell(table.get((task, m))) for m in models)]
            for task in dict.fromkeys(row["task"] for row in best)
        ]
        caption = "The best feature of each task, by model, with its test AUC"
        tables.append(Table(caption, ["Task", *map(display, models)], rows, folded=True))
    lead = (
        "Chosen among all features on training texts without repeats; with several noise seeds, by the first. "
        "The sign tells whether high (+) or low (−) values speak for the class named."
    )
    return Part("What the best features are", lead, [], tables)


def _feature_name(row: Json) -> str:
    if row.get("layer") is None:
        return f"feature {row['feature']}"
    return f"block {row['layer']}, neuron {row['neuron']}"


def _sign(row: Json) -> str:
    return "+" if float(row.get("sign") or 0) > 0 else MINUS


def _feature_cell(row: Json, tasks: Json) -> Cell:
    classes = tasks.get(row["task"], {}).get("classes")
    return Cell(_feature_name(row), f"{_sign(row)} for “{_clip(str(classes[1]), 24)}”" if classes else _sign(row))


def _best_cell(row: Json | None) -> Cell:
    return Cell(DASH) if row is None else Cell(number(row["auc"]), f"{_feature_name(row)} {_sign(row)}")


def _passages(row: Json, tasks: Json) -> tuple[str, ...]:
    """The texts that excite a feature most, each with its class."""
    classes = tasks.get(row["task"], {}).get("classes") or ("0", "1")
    passages = []
    for item in (row.get("texts") or [])[:_TEXTS]:
        text, label = " ".join(str(item["text"]).split()), item.get("label")
        named = f" ({_clip(str(classes[int(label)]), 24)})" if label in (0, 1) else ""
        passages.append(f"“{text}”{named}")
    return tuple(passages)


def _clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _notes(p: _Probing) -> list[str]:
    """How the numbers came about and what to keep in mind."""
    notes = []
    dense = p.dense()
    if dense is not None:
        notes.append(f"A dense probe on all dimensions reaches a mean AUC of {number(dense)}.")
    notes.append(
        "The feature and its sign are chosen by cross-validation on training data; test data are looked at once."
    )
    if any(view.get("mode") == "paper" for view in p.views):
        notes.append(
            f"A model with more features has more tries{_useless(p)}. The view “top {p.top} features” gives all models "
            f"at most {p.top} candidates."
        )
    if {"pca", "gaussian"} <= set(p.main):
        notes.append(
            "A Gaussian's features, whitened coordinates, are PCA's components on another scale. A single feature's "
            "AUC does not see scale, so the two agree by construction."
        )
    if any(family(m) == "random" for m in p.main):
        notes.append(
            "“Random features” are not trained: what they read takes no knowledge of activations beyond their mean and "
            "scale."
        )
    hooks = {hook: m for m, e in p.entries.items() if (hook := e.get("hook")) and hook != p.runs[0].data.get("hook")}
    notes += [f"{display(model)}: read at {hook}, not where the other models are." for hook, model in hooks.items()]
    families = {task.get("family") for task in p.tasks.values()} - {None}
    if families:
        notes.append(
            f"{count(len(p.tasks))} tasks in {_families(len(families))}. Tasks of a family share prompts, so "
            "intervals and p values are over families."
        )
    notes += _size(p)
    told = [f"{name}: {task['note']}" for name, task in p.tasks.items() if task.get("note")]
    if told:
        notes.append(f"Names that mislead. {'; '.join(note.rstrip('.') for note in told)}.")
    skipped = sum("skipped" in line for run in p.runs for line in run.failures)
    if skipped:
        what = "split of a task" if skipped == 1 else "splits of tasks"
        notes.append(f"Left out: {count(skipped)} {what}, listed under “Skipped or failed”.")
    return notes


def _useless(p: _Probing) -> str:
    """Expected validation AUC of the best of as many uninformative features, for the fewest and the most features."""
    rows = p.means[p.means.setting == p.split | Setting(mode="all")]
    rows = rows[rows.metric == "auc_null"].set_index("model").value
    known = sorted((p.features(model), float(rows[model])) for model in p.labels if model in rows.index)
    if not known:
        return ""
    told = ", ".join(f"{number(value)} for K = {count(k)}" for k, value in dict.fromkeys((known[0], known[-1])))
    return f": the best of K useless features is expected at a validation AUC of {told}"


def _size(p: _Probing) -> list[str]:
    """A note on how much text the tasks had, if the runs tell."""
    splits = [
        split
        for task in p.tasks.values()
        for split in task.values()
        if isinstance(split, dict) and {"train", "test"} <= set(split)
    ]
    contexts = [run.data["context"] for run in p.runs if run.data.get("context")]
    if not (splits and contexts):
        return []
    train, test = (max(split[part] for split in splits) for part in ("train", "test"))
    pooling = _POOLING.get(str(p.runs[0].data.get("pooling", "last")), str(p.runs[0].data.get("pooling")))
    return [
        f"Up to {count(train)} training and {count(test)} test prompts a task, cut to {count(max(contexts))} "
        f"tokens; activations of {pooling}. AUCs compare with published ones only on equal rows, context, pooling and "
        "language model."
    ]
