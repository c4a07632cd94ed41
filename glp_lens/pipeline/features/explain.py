"""Explaining features: by a hosted language model, with tests of what the explanations tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from glp_lens.arguments import checked
from glp_lens.endpoint import EndpointSettings
from glp_lens.errors import InputError, counted
from glp_lens.pipeline.features.heldout import HeldOutSettings, open_heldout
from glp_lens.settings import option

if TYPE_CHECKING:
    import pandas as pd

    from glp_lens import lm
    from glp_lens.artifacts import ActivationModel
    from glp_lens.corpus import Document
    from glp_lens.endpoint import Usage
    from glp_lens.features import FeatureFolder
    from glp_lens.features.passages import Ints, Watched

ANSWERS = "hosted"
"""In the folder of features: the answers, so that no question is paid for twice."""


@dataclass(frozen=True, kw_only=True)
class ExplainJob(EndpointSettings, HeldOutSettings):
    """Settings of `features explain`."""

    essentials = (
        "hosted_url", "hosted_model", "hosted_key", "built", "models", "names", "features", "texts", "model", "device",
    )  # fmt: skip

    panel = "Data"

    names: tuple[str, ...] = ()
    """Features to explain, such as 3:1024 or sae/77, separated by commas; by default some of each model at random."""
    features: int = option(20, min=1)
    """Features of each model that are drawn by seed, not dense ones where there are; acts without --names."""
    shown: int = option(10, min=1, panel="Hosted model")
    """Passages that an explanation is made of."""
    tested: int = option(10, min=2, panel="Hosted model")
    """Passages of each kind that it is tested on."""

    def __post_init__(self) -> None:
        """Refuse settings without an endpoint."""
        super().__post_init__()
        if self.hosted_url is None:
            raise InputError("features are explained by a hosted model: pass --hosted-url and --hosted-model")


@checked
def explain(
    settings: ExplainJob,
    *,
    model: lm.Model | None = None,
    texts: Sequence[str | Document] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, pd.DataFrame]:
    """Let a hosted language model explain features in words, and test what the explanations tell.

    Detection: in which passages is the feature active, by its explanation, of some where it is and some of random
    texts, or some where the nearest features are? Fuzzing: are the marked tokens those where it is active? Writes the
    table `explanations` into the folder of features, and keeps the answers there: run it again to continue where it
    stopped.

    Args:
        model: the language model, where it is open already.
        texts: texts in memory, of which the held-out ones are read, instead of those that the settings name.
        say: prints a line.

    Returns:
        The new rows of the table, by the label of the model.

    Raises:
        InputError: features, models, texts or an endpoint that cannot be used.
    """
    from glp_lens import lm
    from glp_lens.activations.writer import locked
    from glp_lens.endpoint import Endpoint
    from glp_lens.features import FeatureFolder
    from glp_lens.features.cases import cases, shown
    from glp_lens.features.explain import Explainer
    from glp_lens.features.passages import read

    folder = FeatureFolder.open(settings.built)
    explainer = Explainer(Endpoint(settings, folder.path / ANSWERS), settings.seed)
    chosen = _chosen(settings, folder)
    made = {}
    with locked(folder.path):
        # First, since a wrong address or key is told here, before texts are read for minutes.
        explanations = {label: explainer.explain(shown(folder, label, own, settings.shown))
                        for label, own in chosen.items()}  # fmt: skip
        opened = open_heldout(settings, folder, model, texts)
        watched = _watched(folder, chosen, opened.trained)
        examples = [folder.table(label, "examples", own) for label, own in chosen.items()]
        passages = read(
            opened.model, opened.documents, watched, context=settings.context, seeds=(settings.seed,),
            length=max(int(each["token_ids"].str.len().max()) for each in examples),
        )  # fmt: skip
        tokenizer = lm.tokenizer_of(opened.model)

        def spell(ids: Ints) -> list[str]:
            return [str(tokenizer.decode([token])) for token in ids.tolist()]

        for label, own in chosen.items():
            given = cases(
                folder, label, own, watched, passages, spell,
                most_shown=settings.shown, tested=settings.tested, seed=settings.seed,
            )  # fmt: skip
            made[label] = explainer.test(given, explanations[label])
            _save(folder, label, made[label])
            say(_line(label, made[label]))
    for note in opened.notes:
        say(f"note: {note}")
    say(_cost(explainer.endpoint.usage))
    return made


def _chosen(settings: ExplainJob, folder: FeatureFolder) -> dict[str, list[int]]:
    """The features to explain, by the label of their model."""
    from glp_lens.features import parse_name
    from glp_lens.features.predict import draw

    named = {name for spec in settings.models for name in (spec, spec.rpartition("=")[0])}
    labels = [each.label for each in folder.about.models if not named or each.label in named]
    chosen: dict[str, set[int]] = {}
    if not settings.names:
        drawn, _ = draw(folder, labels, settings.features, settings.seed)
        for label in labels:
            own = drawn["sparse"].get(label, drawn["alive"].get(label))
            chosen |= {} if own is None else {label: set(own.tolist())}
    for name in settings.names:
        about, feature = parse_name(name, [each for each in folder.about.models if each.label in labels])
        if folder.table(about.label, "examples", [feature]).empty:
            raise InputError(f"the feature {name} has no examples to explain: it is never on")
        chosen.setdefault(about.label, set()).add(feature)
    if not chosen:
        raise InputError(f"no model in {folder.path} has enough features to draw from: name some, --names 3,17")
    return {label: sorted(own) for label, own in chosen.items()}


def _watched(
    folder: FeatureFolder, chosen: Mapping[str, Sequence[int]], trained: Mapping[str, ActivationModel]
) -> dict[str, Watched]:
    """The features, and their neighbours in models that are open."""
    from glp_lens.features.cases import neighbours
    from glp_lens.features.passages import Watched

    wanted = {label: set(own) for label, own in chosen.items()}
    for label, own in chosen.items():
        for near in neighbours(folder, label, own).values():
            for name, other in near:
                if name in trained:
                    wanted.setdefault(name, set()).add(other)
    return {
        label: Watched.of(folder, label, trained[label], np.array(sorted(own), dtype=np.int64))
        for label, own in wanted.items()
    }


def _save(folder: FeatureFolder, label: str, made: pd.DataFrame) -> None:
    """Add explanations to those that are there, in place of older ones of the same features."""
    import pandas as pd

    if folder.has(label, "explanations"):
        before = folder.table(label, "explanations")
        made = pd.concat([before[~before["feature"].isin(made["feature"])], made], ignore_index=True)
    folder.write_table(folder.model(label), "explanations", made.sort_values("feature", ignore_index=True))


def _line(label: str, made: pd.DataFrame) -> str:
    from glp_lens.evals.statistics import bootstrap_mean
    from glp_lens.features.explain import TESTS

    found = []
    for test in TESTS:
        value, low, high, n = bootstrap_mean(made[test])
        auroc = f"{test} AUROC {value:.2f} [{low:.2f}, {high:.2f}] over {counted(n, 'feature')}"
        found.append(auroc if n else f"{test}: none")
    return f"{label}: " + "; ".join(found)


def _cost(usage: Usage) -> str:
    line = (
        f"{counted(usage.asked, 'question')} asked, {usage.cached:,} answered before: "
        f"{counted(usage.prompt_tokens, 'token')} sent, {usage.completion_tokens:,} received, cost {usage.cost:.4g}"
    )
    line += f"; {usage.uncounted:,} without a count of tokens" * (usage.uncounted > 0)
    return line + f"; {usage.unparsable:,} answers lack what was asked for" * (usage.unparsable > 0)
