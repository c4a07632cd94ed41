"""Fidelity: what the language model loses when activations are replaced by reconstructions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glp_lens.evals.fidelity.settings import FidelitySettings
from glp_lens.pipeline.inputs import (
    LanguageModelSettings,
    ModelsSettings,
    ResultSettings,
    TextsSettings,
    at_hook,
    heldout_texts,
    hook_point,
    load_models,
    open_language_model,
    open_training_store,
)
from glp_lens.pipeline.results import finish
from glp_lens.settings import option

if TYPE_CHECKING:
    from glp_lens import lm
    from glp_lens.corpus import Document
    from glp_lens.evals.results import Results


@dataclass(frozen=True, kw_only=True)
class FidelityJob(FidelitySettings, ModelsSettings, LanguageModelSettings, TextsSettings, ResultSettings):
    """Settings of `fidelity`; of the texts the held-out twentieth is used."""

    store: Path = option(Path("acts"), panel="Data")
    """Folder of the activation store that the models were trained on: FVU and mean ablation take its statistics."""
    out: Path = option(Path("results/fidelity"), panel="Run")
    """Folder for the output."""


def fidelity(
    settings: FidelityJob,
    *,
    model: lm.Model | None = None,
    texts: Sequence[str | Document] | None = None,
    page: bool = True,
    command: str | None = None,
    say: Callable[[str], None] = print,
) -> Results:
    """Reconstruction error, and the change in language-model loss, on held-out texts.

    Args:
        model: a HookedTransformer or TransformerBridge to use instead of the one that the settings name.
        texts: texts in memory to use instead of those that the settings name; their held-out part is used.
        page: also write report.html.
        command: the command line, for the page.
        say: prints a line.

    Raises:
        InputError: models, a store, texts or a hook point that cannot be used, or results that are already there.
    """
    from glp_lens.evals import fidelity as suite
    from glp_lens.pipeline.entries import matched_ranks, reconstruction_entries

    settings.refuse_overwrite("results.json")
    trained = load_models(settings.models, settings.device)
    store = open_training_store(settings.store, trained, allow_mismatch=settings.allow_mismatch)
    trained = at_hook(trained, store.hook)
    opened = open_language_model(settings, settings.device) if model is None else model
    point = hook_point(opened, settings.hook, trained)
    settings.out.mkdir(parents=True, exist_ok=True)
    documents = heldout_texts(settings, texts, settings.documents, seed=settings.seed, context=settings.context)
    results = suite.run(
        reconstruction_entries(trained, settings, matched_ranks(trained, store)),
        suite.FidelityData(opened, point, documents, store.stats.mean, store.stats.var.sqrt()),
        FidelitySettings.of(settings),
        folder=settings.out / "cache",
        allow_mismatch=settings.allow_mismatch,
    )
    return finish(results, settings, page=page, command=command, say=say)
