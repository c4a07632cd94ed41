"""The report: one self-contained page from the results of any suites."""

from glp_lens.report.html import write_report
from glp_lens.report.verdicts import Verdict, headline, verdicts

__all__ = ["Verdict", "headline", "verdicts", "write_report"]
