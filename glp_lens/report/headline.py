"""The whole report in a few sentences."""

from __future__ import annotations

import pandas as pd

from glp_lens.display.comparisons import Verdict, mains
from glp_lens.display.labels import display
from glp_lens.evals.registry import in_report
from glp_lens.evals.results import Metric, structured_frame


def verdicts(frame: pd.DataFrame, focus: str = "glp") -> list[Verdict]:
    """All verdicts that the metrics of any suites allow, in the order of the suites.

    Args:
        frame: metrics as `Results.frame` gives them.
        focus: the model that is compared with the others.
    """
    metrics = structured_frame(Metric.from_row(row) for row in frame.to_dict("records"))
    return [v for suite in in_report() for v in suite.page.verdicts(metrics[metrics.suite == suite.name], focus)]


def headline(judged: list[Verdict], focus: str = "glp") -> str:
    """The whole result in a few sentences, losses named.

    Where a rival is compared with several settings of the focus, only the main one counts: the label that equals
    the focus, or else the first.
    """
    if not judged:
        return f"There is nothing to compare {display(focus)} with."
    judged = mains(judged, focus)
    who = display(focus)
    conditions = {suite.name: suite.page.CONDITIONS for suite in in_report()}
    parts = [
        (f"{who} wins in", "over", "ahead"),
        ("It loses in" if any(v.outcome == "ahead" for v in judged) else f"{who} loses in", "to", "behind"),
        ("There is no clear winner in", "against", "unclear"),
    ]
    sentences = []
    for begin, word, outcome in parts:
        rivals: dict[str, list[str]] = {}
        for v in judged:
            if v.outcome == outcome:
                rivals.setdefault(v.field, []).append(display(v.second, conditions.get(v.suite)))
        places = [f"{suite} {word} {_join(list(dict.fromkeys(names)))}" for suite, names in rivals.items()]
        if places:
            sentences.append(f"{begin} {'; in '.join(places)}.")
    return " ".join(sentences)


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
