"""Directions and edits that trained models know: latents of a sparse autoencoder, classes of a conditional GLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from glp_lens import numerics, provenance
from glp_lens.arguments import checked
from glp_lens.directions.direction import Direction
from glp_lens.errors import InputError
from glp_lens.models.glp import GLP
from glp_lens.models.sae import SAE
from glp_lens.types import Acts


@checked
def sae_latent(sae: SAE, index: int, *, hook: str | None = None, name: str | None = None) -> Direction:
    """The decoder row of a latent: the direction in which it adds to the reconstruction.

    Args:
        sae: the autoencoder.
        index: of the latent.
        hook: the hook point; by default the one that the autoencoder was trained at.
        name: by default `latent INDEX`.

    Raises:
        InputError: no such latent, one whose decoder row is 0, or no hook point known.
    """
    _check_latents(sae, [index])
    at = hook or sae.hook
    if at is None:
        raise InputError("this autoencoder does not say where it was trained: pass hook=")
    return Direction.of(
        sae.sae.W_dec[index],
        at,
        name=name or f"latent {index}",
        method="sae",
        provenance={"latent": index, "sae": sae.fingerprint(), **_trained_on(sae)},
    )


@checked
def clamp_latents(sae: SAE, values: Mapping[int, float]) -> Callable[[Acts], Acts]:
    """An edit of rows that sets latents of an autoencoder to values and leaves all else, also its error, as it is.

    The change is `decode(f') - decode(f)`, where `f` are the latents of the row and `f'` the same with the values.
    Other than adding the decoder row, it adds less to a row in which the latent is active already, and with the value
    0 takes the latent out. Templeton et al. 2024, "Scaling monosemanticity", clamp features so and keep the error term.

    Args:
        sae: the autoencoder.
        values: by index of the latent, in the units of `sae.encode`.

    Returns:
        A function of rows `(n, d_in)` for `hooks.edit`:
        `model.hooks(fwd_hooks=[(sae.hook, hooks.edit(clamp_latents(sae, {7: 30.0}), model=model))])`.

    Raises:
        InputError: no latent, or one that is not there.
    """
    if not values:
        raise InputError("clamping needs at least one latent and its value")
    _check_latents(sae, values)

    @torch.no_grad()
    @numerics.own()
    def clamp(x: Acts) -> Acts:
        rows = x.to(sae.sae.W_dec.device)
        latents: Tensor = sae.encode(rows)
        changed = latents.clone()
        for index, value in values.items():
            changed[:, index] = value
        change: Tensor = sae.sae.decode(changed) - sae.sae.decode(latents)
        return x + change.to(x.device)

    return clamp


@checked
def class_means(
    glp: GLP,
    towards: float,
    away: float | None = None,
    *,
    hook: str | None = None,
    name: str | None = None,
    n: int = 4096,
    guidance: float = 1.0,
    seed: int = 0,
    fast: bool = True,
) -> Direction:
    """The mean of a conditional prior's samples of one class less that of another, or of samples of no class.

    Both are drawn from the same noise, which cancels most of the variance of the difference.

    Args:
        glp: a prior that was trained with `condition=`.
        towards: value of the label to steer towards.
        away: value to steer away from; None is the prior without a condition.
        hook: the hook point; by default that of the prior.
        name: by default the values.
        n: samples of each.
        guidance: weight of each condition, more than 1 to exaggerate it; see `GLP.sample`.
        seed: of the noise.
        fast: as in `GLP.sample`.

    Raises:
        InputError: a prior without conditions, one that has not seen the value, or no hook point known.
    """
    vectors = glp.class_vectors
    for value in (towards, *([] if away is None else [away])):
        if value not in vectors:
            known = ", ".join(f"{each:g}" for each in sorted(vectors)) or "none: fit it with condition="
            raise InputError(f"this prior was not conditioned on the class {value:g}: expected one of {known}")
    at = hook or glp.hook
    if at is None:
        raise InputError("this prior does not say where it was trained: pass hook=")
    noise = torch.randn(n, glp.d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)

    def mean(value: float | None) -> Tensor:
        if value is None:  # there is nothing that guidance could weigh
            return glp.sample(n, noise=noise, fast=fast).double().mean(0).cpu()
        drawn = glp.sample(n, noise=noise, condition=vectors[value], guidance=guidance, fast=fast)
        return drawn.double().mean(0).cpu()

    means = [mean(value) for value in (towards, away)]
    return Direction.of(
        means[0] - means[1],
        at,
        name=name or (f"class {towards:g}" if away is None else f"class {towards:g} - {away:g}"),
        method="glp-classes",
        provenance={"classes": [towards, away], "samples": n, "guidance": guidance, "seed": seed, "fast": fast,
                    "glp": glp.fingerprint(), **_trained_on(glp)},
    )  # fmt: skip


def _check_latents(sae: SAE, indices: object) -> None:
    for index in list(indices):  # type: ignore[call-overload]
        if not 0 <= index < sae.n_features:
            raise InputError(f"no latent {index}: this autoencoder has {sae.n_features}, from 0")


def _trained_on(model: SAE | GLP) -> dict[str, object]:
    """The language model and the store of a model, as far as they are known."""
    known = provenance.trained_on(model)
    return {key: known[key] for key in ("model", "weights") if known.get(key) is not None}
