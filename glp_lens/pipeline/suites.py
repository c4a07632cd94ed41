"""The jobs of suites: trained models are loaded and measured; results are saved, shown on a page, and printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glp_lens.arguments import checked
from glp_lens.errors import InputError, or_warning
from glp_lens.evals.registry import SUITES, Suite
from glp_lens.pipeline.inputs import LanguageModelSettings, SuiteJob, load_models, open_language_model

if TYPE_CHECKING:
    from glp_lens import lm
    from glp_lens.corpus import Document
    from glp_lens.evals.results import Results


TRAINED = "trained"
"""Entry of the results' data: the models that were measured, hashes of their weights by label."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What is in memory already, to be used instead of what a job's settings name.

    Attributes:
        model: a HookedTransformer or TransformerBridge.
        texts: of which the held-out part is used.
        say: prints a line, before work that takes long.
    """

    model: lm.Model | None = None
    texts: Sequence[str | Document] | None = None
    say: Callable[[str], None] = print

    def language_model(self, settings: LanguageModelSettings, device: str) -> lm.Model:
        """The language model, opened if it is not in memory."""
        return open_language_model(settings, device) if self.model is None else self.model


@checked
def run_suite(
    job: SuiteJob,
    *,
    model: lm.Model | None = None,
    texts: Sequence[str | Document] | None = None,
    page: bool = True,
    command: str | None = None,
    say: Callable[[str], None] = print,
) -> Results:
    """Measure trained models by the suite that a job is of. Writes results.json, metrics.csv and report.html to `out`.

    A second run continues where the first stopped. Results are saved before any page is made of them.

    Args:
        job: of any suite, for example a `SteerJob`.
        model: a HookedTransformer or TransformerBridge to use instead of the one that the settings name.
        texts: texts in memory to use instead of those that the settings name; their held-out part is used.
        page: also write report.html.
        command: the command line, for the page.
        say: prints a line.

    Raises:
        InputError: models, stores, texts or a hook point that cannot be used, or results that are already there.
    """
    from glp_lens.evals.results import Results
    from glp_lens.report import write_report

    suite = suite_of(type(job))
    in_memory = model is not None or texts is not None
    with job.at_work(suite.name, "results.json", *(["report.html"] if page else []), in_memory=in_memory) as begun:
        files = [job.out / "results.json", job.out / "metrics.csv"]
        results: Results | None = None
        if begun.has_results:
            with suppress(InputError):  # if they are damaged, they are made again
                results = Results.load(job.out)
                say(f"{files[0]} is complete: what an interrupted run left to make is made of it")
        if results is None:
            trained = load_models(job.models, job.device)
            known = {label: each.weights_hash() for label, each in trained.items()}
            results = suite.job.measure(job, trained, Inputs(model, texts, say))
            results.data[TRAINED] = known
            begun.saving()
            results.save(job.out)
            begun.saved()
        if table := or_warning("a table of the results", lambda: suite.page.text_table(results)):
            say(table)
        for sentence in results.failures:
            say(f"note: {sentence}")
        pages = [or_warning("a page of the results", job.show)]
        if page:
            context = {"title": suite.page.TITLE, "command": command, "seed": job.seed}
            pages.append(or_warning("report.html", lambda: [write_report([results], job.out, context)]))
        files = [*(file for made in reversed(pages) for file in made or ()), *files]
        begun.complete = None not in pages
        say(f"saved: {', '.join(map(str, files[:-1]))} and {files[-1]}")
    return results


def suite_of(job: type[SuiteJob]) -> Suite:
    """The suite whose settings a class is."""
    return next(suite for suite in SUITES if suite.settings is job)
