"""The report: one self-contained page from the results of any suites."""

from glp_lens.display.comparisons import Verdict
from glp_lens.report.headline import headline, verdicts
from glp_lens.report.html import write_report

__all__ = ["Verdict", "headline", "verdicts", "write_report"]
