"""What jobs on a folder of features read: the folder, and the models that its features are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glp_lens.errors import InputError
from glp_lens.pipeline.inputs import load_models
from glp_lens.settings import Settings, option

if TYPE_CHECKING:
    from glp_lens import lm
    from glp_lens.artifacts import ActivationModel
    from glp_lens.features import FeatureFolder, ModelAbout
    from glp_lens.types import Json


@dataclass(frozen=True, kw_only=True)
class FolderSettings(Settings):
    """The folder of features."""

    panel = "Data"

    built: Path = option(Path("features"), flag="--folder")
    """Folder of features, as glp-lens features build makes it."""


@dataclass(frozen=True, kw_only=True)
class FolderModelsSettings(FolderSettings):
    """The folder of features, and the models that they are of."""

    models: tuple[str, ...] = ()
    """Which of its models, separated by commas, by their labels; label=folder says where one lies now. By default all,
    where they lay."""


def check_language_model(folder: FeatureFolder, model: lm.Model, identity: Json, *, allow_mismatch: bool) -> list[str]:
    """Refuse another language model than the features were built with.

    Args:
        folder: of the features.
        model: the language model.
        identity: `lm.identity(model)`.
        allow_mismatch: accept it.

    Returns:
        Sentences for the accepted mismatches.

    Raises:
        InputError: another language model, or weight processing, and not `allow_mismatch`.
    """
    from glp_lens import provenance

    notes, remedy = [], "open the language model that they were built with (--model)"
    for hook in dict.fromkeys(each.hook for each in folder.about.models):
        here, then = provenance.here(model, hook, identity), {"hook": hook, **folder.about.language_model}
        notes.append(
            provenance.check("the features were built", then, here, remedy=remedy, allow_mismatch=allow_mismatch)
        )
    return [note for note in dict.fromkeys(notes) if note]


def open_models(
    folder: FeatureFolder, model: lm.Model, specs: Sequence[str], device: str, *, allow_mismatch: bool
) -> tuple[dict[str, ActivationModel], list[str]]:
    """`open_featurizers`, once the language model is checked; with sentences for what was accepted."""
    from glp_lens import lm

    identity = lm.identity(model)
    notes = check_language_model(folder, model, identity, allow_mismatch=allow_mismatch)
    trained = open_featurizers(folder, model, specs, device, identity=identity, allow_mismatch=allow_mismatch)
    return trained, notes


def open_featurizers(
    folder: FeatureFolder,
    model: lm.Model,
    specs: Sequence[str],
    device: str,
    *,
    identity: Json | None = None,
    allow_mismatch: bool,
) -> dict[str, ActivationModel]:
    """The models of a folder by label, each at its hook point; neurons and drawn random features are made anew.

    Args:
        folder: of the features.
        model: the language model.
        specs: labels, or `label=folder`; empty for all.
        device: of the models.
        identity: `lm.identity(model)`, where it is known already: making it reads all weights.
        allow_mismatch: accept other weights than the features were built with.

    Raises:
        InputError: no such label, a model that cannot be opened, or another one than the features were built with.
    """
    from glp_lens import provenance
    from glp_lens.models.neurons import Neurons

    places = {each.label: each.name for each in folder.about.models}
    if specs:
        given = [(spec, "", "") if spec in places else spec.rpartition("=") for spec in specs]
        places = {folder.model(label or place).label: place if label and place else places.get(label or place, "")
                  for label, _, place in given}  # fmt: skip
    opened: dict[str, ActivationModel] = {}
    for label, place in places.items():
        about = folder.model(label)
        if about.kind == "neurons":
            made: ActivationModel = Neurons.of(model, about.hook, identity)
        elif place:
            ((_, made),) = load_models([f"{label}={place}"], device).items()
            made = provenance.bound(made, about.hook)
        elif about.kind == "random":
            made = _random(folder, about, opened, device)
        else:
            raise InputError(f"no folder of model {label!r} is known: pass --models {label}=FOLDER")
        _check(about, made, place, allow_mismatch=allow_mismatch)
        opened[label] = made
    return opened


def _random(
    folder: FeatureFolder, about: ModelAbout, opened: Mapping[str, ActivationModel], device: str
) -> ActivationModel:
    """The random features that were drawn to match the first GLP."""
    from glp_lens import provenance
    from glp_lens.evals.probing.job import random_control

    trained = dict(opened)
    first = next((each for each in folder.about.models if each.kind == "glp" and each.name), None)
    if first is not None and first.label not in trained:
        trained = {first.label: provenance.bound(load_models([f"{first.label}={first.name}"], device)[first.label],
                                                 about.hook)}  # fmt: skip
    return random_control(trained, seed=int(folder.about.settings.get("seed", 0)))


def _check(about: ModelAbout, made: ActivationModel, place: str, *, allow_mismatch: bool) -> None:
    from glp_lens.interface import Featurizer

    where = f" in {place}" if place else ""
    if not isinstance(made, Featurizer) or made.kind != about.kind or made.n_features != about.n_features:
        raise InputError(
            f"the features of {about.label!r} are those of a model of kind {about.kind} with {about.n_features}, and "
            f"that{where} is another: pass --models {about.label}=FOLDER"
        )
    # What neurons are is in the language model, which was compared already.
    alike = about.kind == "neurons" or not about.fingerprint or made.fingerprint() == about.fingerprint
    if not alike and not allow_mismatch:
        raise InputError(
            f"the model{where} has other weights than {about.label!r} had when the features were built: pass "
            f"--models {about.label}=FOLDER, build them again, or pass --allow-mismatch"
        )
