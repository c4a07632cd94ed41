"""What jobs read that test descriptions of features: the models, and texts that no example of a feature is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from glp_lens.errors import InputError, counted
from glp_lens.pipeline.features.inputs import FolderModelsSettings, open_models
from glp_lens.pipeline.inputs import (
    ColumnSettings,
    ContextSettings,
    LanguageModelSettings,
    RunSettings,
    heldout_texts,
    open_language_model,
)
from glp_lens.settings import option

if TYPE_CHECKING:
    from glp_lens import lm
    from glp_lens.artifacts import ActivationModel
    from glp_lens.corpus import Document
    from glp_lens.features import FeatureFolder


@dataclass(frozen=True, kw_only=True)
class HeldOutSettings(FolderModelsSettings, LanguageModelSettings, ContextSettings, ColumnSettings, RunSettings):
    """Features, and the texts that they are tested on."""

    panel = "Data"

    documents: int = option(500, min=2, memory=True)
    """Most texts, of the held-out twentieth of --texts; none that an example in the folder is of."""
    allow_mismatch: bool = option(False, panel="Language model")
    """Use other models than the features were built with."""


@dataclass(frozen=True)
class Opened:
    """What is open.

    Attributes:
        model: the language model.
        trained: the models by label, at their hook points.
        documents: texts that no example is of.
        notes: what was accepted, in sentences.
    """

    model: lm.Model
    trained: Mapping[str, ActivationModel]
    documents: list[Document]
    notes: list[str]


def open_heldout(
    settings: HeldOutSettings, folder: FeatureFolder, model: lm.Model | None, texts: Sequence[str | Document] | None
) -> Opened:
    """Open the language model, the models of a folder and the texts.

    Args:
        settings: say which.
        folder: of the features.
        model: the language model, where it is open already.
        texts: in memory, instead of those that the settings name.

    Raises:
        InputError: one of them cannot be opened, does not fit the features, or all texts are examples.
    """
    seen = {
        int(key)
        for each in folder.about.models
        for key in folder.table(each.label, "examples")["key"].to_numpy().astype(np.uint64)
    }
    found = heldout_texts(settings, texts, settings.documents, seed=settings.seed, context=settings.context)
    documents = [document for document in found if document.id not in seen]
    if len(documents) < 2:
        raise InputError(f"{len(found)} held-out texts, {len(found) - len(documents)} of them examples of features: "
                         "pass --texts that the features were not built on")  # fmt: skip
    model = model or open_language_model(settings, settings.device)
    trained, notes = open_models(
        folder, model, settings.models, settings.device, allow_mismatch=settings.allow_mismatch
    )
    if left_out := len(found) - len(documents):
        notes.append(f"left out, as examples of features: {left_out} of {counted(len(found), 'text')}")
    return Opened(model, trained, documents, notes)
