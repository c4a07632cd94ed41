"""What features write: their directions, the tokens that these speak for, and what is specific to a prior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from glp_lens import lm
from glp_lens.artifacts import ActivationModel
from glp_lens.features.directions import class_means, learned, top_rows
from glp_lens.features.folder import TABLES, FeatureFolder, ModelAbout, Way
from glp_lens.features.lens import Lens
from glp_lens.features.prior_effects import SIGMAS, prior_effects
from glp_lens.features.sample import Sample, blocks, options_of
from glp_lens.models.glp import GLP


def describe(
    folder: FeatureFolder,
    about: ModelAbout,
    model: ActivationModel,
    samples: Mapping[str, Sample],
    language_model: lm.Model | None,
    *,
    sigmas: Sequence[float] = SIGMAS,
    seed: int = 0,
) -> list[str]:
    """Write the directions of a model's features, the table `writes`, and of a GLP the table `prior`.

    Directions are what the model consists of (see `directions.learned`), of a GLP the Jacobians (see `prior_effects`),
    and of every model the class means: the mean activation of a feature's top rows less that of all. Those of neurons
    are taken in the residual stream, where the other models are read.

    Args:
        folder: to write to.
        about: what describes the model.
        model: bound to its hook point.
        samples: by hook point, of the same tokens.
        language_model: None leaves the tokens out, and the output weights of neurons.
        sigmas: noise levels of the table `prior`, besides that of the features.
        seed: of the noise of the features.

    Returns:
        A sentence for each thing that could not be described.

    Raises:
        InputError: neurons of another language model.
    """
    sample, hook = samples[about.hook], about.hook
    if about.kind == "neurons":  # their activations are not where they write
        hook = next((name for name in samples if lm.RESIDUAL.fullmatch(name)), "")
    features = blocks(model, options_of(about), sample, seed)
    top = top_rows(features, len(sample), about.n_features, signed=about.signed)
    directions: dict[Way, Tensor] = {}
    if isinstance(model, GLP):
        assert about.sigma is not None
        table, directions["jacobian"] = prior_effects(model, sample, top, about.sigma, sigmas=sigmas, seed=seed)
        folder.write_table(about, "prior", table)
    elif (own := learned(model, language_model)) is not None:
        directions[own[0]] = own[1]
    if hook:
        directions["class mean"] = class_means(samples[hook].rows, top)
    for way, vectors in directions.items():
        folder.write_directions(about, way, vectors)
    if language_model is None:
        return [f"{about.label}: without a language model there are no tokens that its features write"]
    if about.kind != "neurons" and not lm.RESIDUAL.fullmatch(hook):
        return [f"{about.label}: {hook} is not in the residual stream, so that its directions have no tokens"]
    _write_tokens(folder, about, directions, Lens(language_model))
    return []


def _write_tokens(folder: FeatureFolder, about: ModelAbout, directions: Mapping[Way, Tensor], lens: Lens) -> None:
    import pandas as pd

    rows = [row for way, vectors in directions.items() for row in lens.rows(way, vectors)]
    frame = pd.DataFrame(rows, columns=list(TABLES["writes"]))
    folder.write_table(about, "writes", frame.sort_values("feature", kind="stable", ignore_index=True))
