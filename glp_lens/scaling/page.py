"""The page of a scaling run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from glp_lens.display.comparisons import Difference, Verdict, judge, opening, shown
from glp_lens.display.elements import Cell, Section, Table, find_row, table_of, value_cell
from glp_lens.display.labels import DASH, count, display, flops, interval, number, rounded, with_interval
from glp_lens.display.overview import Column, Overview, make_overview
from glp_lens.evals.results import Setting, structured_frame
from glp_lens.report.html import write_page as write
from glp_lens.scaling.analysis import FILE_NAME, FRONTIER, HELD_OUT, HOURS
from glp_lens.scaling.fits import DECADES
from glp_lens.scaling.plots import by_compute, overview

if TYPE_CHECKING:
    from glp_lens.scaling.analysis import Analysis

_HELD = {"largest": "budget", "size": "size"}
_LARGEST = Setting(cells=FRONTIER, held="largest")


def write_page(found: Analysis, out: Path) -> Path:
    """Write `report.html` and `plots/*.png`; gives the path of the page."""
    frame = structured_frame(found.results.metrics)
    sections = [_loss(found, frame)] + ([_utility(found, frame)] if found.shown else [])
    context = {"title": "What compute buys", "focus": "glp"}
    judged = _verdicts(found, frame)
    return write(
        sections,
        {"utility": judged},
        [found.results],
        out,
        context,
        table=_overview(found, frame, judged),
        lead=_headline(found, frame),
        trained_once=False,
        numbers=FILE_NAME,
    )


def _headline(found: Analysis, frame: pd.DataFrame) -> str:
    best = found.groups.sort_values("loss").iloc[0]
    parts = [f"{len(found.groups)} sizes and budgets of priors, {count(found.groups.seeds.sum())} trainings."]
    if found.gaussian_loss is not None:
        below = 100 * (1 - best.loss / found.gaussian_loss)
        side = "below" if below >= 0 else "above"
        parts.append(
            f"The best, {best['size']} after {count(best.rows)} rows, has a held-out loss of {number(best.loss)}, "
            f"{number(abs(below), 1)}% {side} the least of any Gaussian."
        )
    law = found.laws.get(FRONTIER)
    if law is not None and math.isfinite((alpha := law.exponent).ci_low):
        parts.append(
            "Along the frontier the loss above its floor falls as compute to the power of "
            f"{with_interval(-alpha.value, -alpha.ci_high, -alpha.ci_low)}, over {number(law.decades, 1)} "
            "powers of ten."
        )
    predicted = find_row(frame, setting=_LARGEST, metric="loss_predicted")
    measured = find_row(frame, setting=_LARGEST, metric="loss_measured")
    if predicted is not None and measured is not None:
        parts.append(
            "A fit without the largest cell foretells "
            f"{with_interval(predicted.value, predicted.ci_low, predicted.ci_high)} for it; it has "
            f"{number(measured.value)}."
        )
    return " ".join(parts)


def _overview(found: Analysis, frame: pd.DataFrame, judged: Sequence[Verdict]) -> Overview | None:
    """The priors of most compute beside the best of each other kind that costs no more, a column a utility."""
    last = found.groups.sort_values("flops").iloc[-1]
    columns = []
    for utility in found.shown:
        own = frame[frame.task == utility.name]
        priors = found.utilities[
            (found.utilities.utility == utility.name)
            & (found.utilities.kind == "glp")
            & (found.utilities["size"] == last["size"])
            & (found.utilities.rows == last.rows)
        ]
        if priors.empty:
            continue
        ends = f"mean of {len(priors)} seeds" if len(priors) > 1 else interval(*priors.iloc[0][["ci_low", "ci_high"]])
        cells = {"glp": Cell(number(priors.value.mean()), ends)}
        leads = own[(own.metric == "lead") & _of_group(own, last)]
        for lead in leads.itertuples():
            cells[lead.other] = value_cell(
                find_row(own, metric="utility", model=lead.other, setting=Setting(cell=lead.setting.get("cell")))
            )
        title, _, measure = utility.title.partition(":" if ":" in utility.title else ",")
        better = "higher is better" if utility.higher else "lower is better"
        units = f"{count(priors.n.min())} units" if priors.n.min() else DASH
        columns.append(
            Column("utility", title.strip(), "; ".join(filter(None, [measure.strip(), better])), cells, units,
                   utility.title)
        )  # fmt: skip
    below = {"glp": f"{last['size']}, {rounded(last.parameters)} parameters, {rounded(last.rows)} rows"}
    return make_overview(columns, judged, "glp", {}, below) if columns else None


def _of_group(own: pd.DataFrame, group: pd.Series) -> np.ndarray:
    """Which rows are of a size and budget."""
    same = [s.get("size") == group["size"] and s.number("rows") == group.rows for s in own.setting]
    return np.array(same, dtype=bool)


def _loss(found: Analysis, frame: pd.DataFrame) -> Section:
    own = frame[frame.task == HELD_OUT]
    notes = [
        "Compute of a branch is that of the whole training it equals. Losses are those of the same held-out rows with "
        "the same noise. Sizes are width x blocks.",
        "L = E + A C^-alpha, by Huber's loss on the residuals of log L; intervals by a wild bootstrap that keeps what "
        "the cells of a size and seed share, on the frontier those of a size. The frontier is the lower convex hull in "
        "the log-log plot of the means over seeds. That the law goes on, intervals take as given.",
        "The largest budget of a size is foretold from smaller budgets of the same seeds, which is easier than to "
        "foretell another training; that of the frontier without the largest size is not.",
        "What rests on one training, of one size and seed, has no interval: train more seeds. Nor has a frontier of "
        "one or two sizes: train more sizes.",
        f"An irreducible loss E is told only of fits over at least {DECADES:g} powers of ten of compute.",
    ]
    seed = find_row(own, metric="loss_seed_sd")
    if seed is not None:
        notes.append(
            f"Seeds scatter with a standard deviation of {number(seed.value, 4)} ({count(seed.n)} degrees of freedom)."
        )
    tables = [_fits(found, own), _held_out(own), _expected(own), _cells(found)]
    return Section(
        "loss",
        "Loss: how it falls with compute",
        "Each point is a prior of its own, trained for its budget. What no other reaches with less compute is the "
        "frontier, and a power law fitted to it says what more compute should give.",
        [overview(found)],
        [table for table in tables if table.rows],
        notes=notes,
    )


def _fits(found: Analysis, own: pd.DataFrame) -> Table:
    rows = []
    for name, law in found.laws.items():
        straight = find_row(own, setting=Setting(cells=name, floor="0"), metric="exponent")
        fitted = Setting(cells=name, floor="fitted")
        rows.append(
            [
                Cell("frontier" if name == FRONTIER else name),
                value_cell(find_row(own, setting=fitted, metric="exponent")),
                value_cell(find_row(own, setting=fitted, metric="floor")),
                Cell(number(law.decades, 1)),
                value_cell(find_row(own, setting=fitted, metric="error_percent"), 2),
                value_cell(straight),
            ]
        )
    header = ["Cells", "alpha", "E", "Powers of ten", "Error, %", "alpha with E = 0"]
    return Table("Fits of L = E + A C^-alpha. Error: root mean square of the residuals.", header, rows)


def _held_out(own: pd.DataFrame) -> Table:
    rows = []
    for row in own[own.metric == "loss_predicted"].itertuples():
        found, beyond = (find_row(own, setting=row.setting, metric=m) for m in ("loss_measured", "decades_beyond"))
        if found is None or beyond is None:
            continue
        measured = found.value
        within = DASH  # one trunk alone has no interval
        if math.isfinite(row.ci_low):
            within = "yes" if row.ci_low <= measured <= row.ci_high else "no"
        rows.append(
            [
                Cell(f"{row.setting.get('cells')}, without the largest {_HELD[row.setting.get('held')]}"),
                Cell(number(row.value), interval(row.ci_low, row.ci_high)),
                Cell(number(measured)),
                Cell(number(100 * (measured / row.value - 1), 1)),
                Cell(within),
                Cell(number(beyond.value, 1)),
            ]
        )
    header = ["Fit", "Foretold, of one training", "Measured", "Off by, %", "Within", "Powers of ten beyond"]
    return Table("What fits to the smaller cells foretell of the largest.", header, rows)


def _expected(own: pd.DataFrame) -> Table:
    rows = []
    for hours in HOURS:
        setting = Setting(cells=FRONTIER, hours=hours)
        at = {name: find_row(own, setting=setting, metric=name) for name in
              ("loss_expected", "below_bound_percent", "decades_beyond")}  # fmt: skip
        if at["loss_expected"] is not None:
            rows.append([Cell(f"{hours:g}"), value_cell(at["loss_expected"]), value_cell(at["below_bound_percent"], 1),
                         value_cell(at["decades_beyond"], 1)])  # fmt: skip
    header = ["Hours", "Loss", "Below the Gaussian, %", "Powers of ten beyond the cells"]
    return Table("What hours of this machine should buy, by the fit to the frontier.", header, rows)


def _cells(found: Analysis) -> Table:
    bound = found.gaussian_loss
    return table_of(
        "All sizes and budgets, means over seeds; bold: on the frontier.",
        [
            ("Size", [Cell(f"{g.size}") for g in found.groups.itertuples()]),
            ("Parameters", [Cell(count(g.parameters)) for g in found.groups.itertuples()]),
            ("Rows seen", [Cell(count(g.rows), f"{g.passes:.1f} passes") for g in found.groups.itertuples()]),
            ("FLOPs", [Cell(flops(g.flops)) for g in found.groups.itertuples()]),
            ("Loss", [Cell(number(g.loss), best=bool(g.frontier)) for g in found.groups.itertuples()]),
            ("Below the Gaussian, %", [Cell(number(100 * (1 - g.loss / bound), 1) if bound else DASH)
                                       for g in found.groups.itertuples()]),
            ("Seeds", [Cell(str(g.seeds)) for g in found.groups.itertuples()]),
        ],
        folded=True,
    )  # fmt: skip


def _utility(found: Analysis, frame: pd.DataFrame) -> Section:
    columns = {
        "Against loss": Setting(against="loss"),
        "Against loss, given FLOPs": Setting(against="loss", given="flops"),
        "Against FLOPs": Setting(against="flops"),
    }
    correlated = frame[(frame.metric == "spearman") & (frame.model == "glp")]
    names = [u for u in found.shown if u.name in set(correlated.task)]
    table = table_of(
        "Rank correlations of what priors are good for. Where less of it is better, that with loss should be positive.",
        [("Utility", [Cell(u.title, "" if u.higher else "less is better") for u in names])]
        + [
            (title, [value_cell(find_row(correlated, task=u.name, setting=setting), 2) for u in names])
            for title, setting in columns.items()
        ],
    )
    others = frame[(frame.metric == "spearman") & (frame.model != "glp")]
    titles = {u.name: u.title for u in found.shown}
    rows = [
        [Cell(f"{display(row.model)}: {titles[row.task]}"), Cell(str(row.setting.get("against"))),
         Cell(number(row.value, 2), interval(row.ci_low, row.ci_high, 2))]
        for row in others.itertuples()
    ]  # fmt: skip
    baselines = Table("Rank correlations of the baselines'", ["Utility", "Against", "Correlation"], rows, folded=True)
    return Section(
        "utility",
        "Utility: does a lower loss help?",
        "The loss costs little to measure, and the paper says that it foretells what a prior is good for. So each "
        "utility is set against it, and against compute, beside the other kinds of models.",
        [by_compute(found)],
        [each for each in (table, baselines) if each.rows],
        notes=[
            "Intervals resample whole sizes, since all seeds and budgets of one may lie off together. “Given FLOPs”: "
            "the partial rank correlation, what loss tells beyond compute.",
            "A correlation without an interval is the same in all resamples, or of one size.",
        ],
    )


def _verdicts(found: Analysis, frame: pd.DataFrame) -> list[Verdict]:
    """The priors of most compute beside the best of each other kind that costs no more."""
    last = found.groups.sort_values("flops").iloc[-1]
    costs = found.cells.set_index("cell").flops
    made = []
    for utility in found.shown:
        own = frame[(frame.task == utility.name)]
        for lead in own[(own.metric == "lead") & _of_group(own, last)].itertuples():
            gap = Difference(
                "glp", lead.other, utility.name, lead.setting, lead.value, lead.ci_low, lead.ci_high, lead.n
            )
            outcome = judge(gap, higher_is_better=True)
            matter = f"in {utility.title}"
            start = opening(outcome, display("glp"), display(lead.other), matter)
            rival = lead.setting.get("cell")
            which = "the best that costs no more" if costs[rival] <= last.flops else "the cheapest, which costs more"
            sentence = (
                f"{start}: {last['size']} after {count(last.rows)} rows against {rival}, {which}, "
                f"difference {shown(gap)}."
            )
            start_at = find_row(own, metric="leads_from", other=lead.other)
            detail = ""
            if start_at is not None and math.isfinite(start_at.value):
                detail = f"Clearly so from {flops(start_at.value)} FLOPs on."
            made.append(
                Verdict("scaling", outcome, "glp", lead.other, sentence, detail, utility.title, visible=gap.visible)
            )
    return made
