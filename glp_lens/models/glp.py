"""The generative latent prior: a diffusion model of activations (Luo et al., 2026, arXiv 2602.06964)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Generator, Tensor

from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.flow.path import interpolate, velocity_target
from glp_lens.flow.schedule import grid, path_from_sigma, path_from_u
from glp_lens.flow.solvers import integrate
from glp_lens.interface import Featurizer, Projector, Reconstructor, Sampler, Scorer, VelocityField
from glp_lens.models import released
from glp_lens.models.denoiser import Denoiser, DenoiserConfig
from glp_lens.models.fitting import fit, initial_denoiser
from glp_lens.models.rows import check_rows, draw_noise, mean_and_std
from glp_lens.training.config import TrainConfig
from glp_lens.types import Acts, Features, Json, PerRow

if TYPE_CHECKING:
    from glp_lens.activations import ActivationStore, ActivationStream

Layer = int | Tensor | None
"""Layer of the language model, for multi-layer priors: one for all rows, or `(n,)` integers."""

_BATCH = 4096
_SCORE_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)


class GLP(ActivationModel, Featurizer, Reconstructor, Projector, Sampler, Scorer, VelocityField):
    """A denoiser with the normaliser of its training data.

    Attributes:
        denoiser: the network, in normalised space.
        mean: `(d_in,)`, or `(layers, d_in)` for a multi-layer prior.
        var: likewise, the population variance.
        history: training curve, empty if unknown.
    """

    kind: ClassVar[str] = "glp"
    stochastic: ClassVar[bool] = True

    def __init__(self, denoiser: Denoiser, mean: Tensor, var: Tensor, provenance: Json | None = None) -> None:
        config = denoiser.config
        layers = config.multi_layer_n_layers
        shape = (config.d_input,) if layers is None else (layers, config.d_input)
        if mean.shape != shape or var.shape != shape:
            raise InputError(f"normaliser must have shape {shape}, got {tuple(mean.shape)} and {tuple(var.shape)}")
        self.denoiser = denoiser.eval()
        self.mean, self.var = mean.float(), var.float()
        self.d_in = config.d_input
        self.provenance = provenance or {}
        self.history: list[Json] = []

    # -- training ------------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        store: ActivationStore | ActivationStream,
        config: TrainConfig | None = None,
        *,
        d_model: int | None = None,
        d_mlp: int | None = None,
        n_layers: int = 6,
        device: str = "cpu",
        validation: Acts | None = None,
        state: Path | None = None,
    ) -> Self:
        """Train a prior on a store, or on a stream while it is collected, which takes a `state` file.

        Args:
            config: the recipe; the paper's by default.
            d_model: width of the denoiser, by default twice that of the activations, as in the paper.
            d_mlp: meta-neurons a block, by default four times the width of the activations.
            n_layers: blocks.
            validation: held-out activations `(n, d_in)`, scored along the way with fixed noise.
            state: file that keeps the state of an interrupted training; remove it once the model is saved.

        Raises:
            InputError: settings that cannot train, or a diverged loss.
        """
        config = config or TrainConfig()
        shape = DenoiserConfig(store.d_in, d_model or 2 * store.d_in, d_mlp or 4 * store.d_in, n_layers)
        mean, std = mean_and_std(store)
        model = cls(initial_denoiser(shape, config.seed), mean, std**2).to(device)
        fit(model, store, config, validation=validation, state=state)
        return model

    # -- normalised space ----------------------------------------------------------------------------------

    def normalize(self, x: Acts, layer: Layer = None) -> Acts:
        """Each dimension to mean 0 and variance 1, by the training data's statistics."""
        mean, std = self._statistics(layer, x.device)
        return (x - mean) / std

    def denormalize(self, z: Acts, layer: Layer = None) -> Acts:
        """Back to activation units."""
        mean, std = self._statistics(layer, z.device)
        return z * std + mean

    def velocity(self, z: Acts, sigma: float | Tensor, layer: Layer = None) -> Acts:
        """The denoiser: expected `eps - x` in normalised space; `sigma` is a number or `(n,)`."""
        sigmas, layer = torch.as_tensor(sigma).to(self.device), self._to_device(layer)
        return self._by_batch(
            lambda rows, index: self.denoiser(rows, _pick(sigmas, index), _pick(layer, index)),
            check_rows(z, self.d_in),
        ).to(z.device)

    # -- capabilities --------------------------------------------------------------------------------------

    @property
    def n_features(self) -> int:
        """Number of meta-neurons: blocks times hidden width."""
        return self.denoiser.config.n_layers * self.denoiser.config.d_mlp

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    def encode(
        self,
        x: Acts,
        *,
        sigma: float = 0.1,
        layer: Layer = None,
        noise: Acts | None = None,
        generator: Generator | None = None,
    ) -> Features:
        """Meta-neurons `(n, n_layers * d_mlp)`, layer-major, of the activations noised to `sigma`.

        The paper's probes use sigma = 0.1 (its u = 0.9).
        """
        if not 0 <= sigma <= 1:
            raise InputError(f"sigma must be in [0, 1]: 0 is data and 1 is noise, got {sigma}")
        layer = self._to_device(layer)
        z, eps = self._enter(x, layer, noise, generator)
        return self._by_batch(
            lambda rows, index: self.denoiser.meta_neurons(
                interpolate(rows, eps[index], sigma), sigma, _pick(layer, index)
            ),
            z,
        ).to(x.device)

    def project(
        self,
        x: Acts,
        *,
        u: float | None = None,
        sigma: float | None = None,
        steps: int = 20,
        layer: Layer = None,
        noise: Acts | None = None,
        generator: Generator | None = None,
        solver: str = "euler",
    ) -> Acts:
        """Noise the activations, then denoise them: the paper's projection onto the manifold (section 4).

        Args:
            u: the released code's noise level, an index into the `steps`-grid; 0.5 if neither is given.
            sigma: the noise level itself; 0 gives the activations back.
            steps: pace of the grid; about `sigma * steps` network calls are made.
        """
        if u is not None and sigma is not None:
            raise InputError("pass u (the released code's noise level) or sigma, not both")
        path = path_from_sigma(sigma, steps) if sigma is not None else path_from_u(0.5 if u is None else u, steps)
        x = check_rows(x, self.d_in)
        if float(path[0]) == 0:
            return x.clone()
        layer = self._to_device(layer)
        z, eps = self._enter(x, layer, noise, generator)
        start = interpolate(z, eps, float(path[0]))
        return self.denormalize(self._flow(start, path, layer, solver), layer).to(x.device)

    def reconstruct(
        self, x: Acts, *, noise: Acts | None = None, generator: Generator | None = None, **options: float
    ) -> Acts:
        """`project`, under the name that reconstruction suites ask for."""
        return self.project(x, noise=noise, generator=generator, **options)  # type: ignore[arg-type]

    def sample(
        self,
        n: int,
        *,
        steps: int = 20,
        layer: Layer = None,
        noise: Acts | None = None,
        generator: Generator | None = None,
        solver: str = "euler",
    ) -> Acts:
        """Activations drawn by following the flow from noise to data on the `steps`-grid."""
        layer = self._to_device(layer)
        z = draw_noise(n, self.d_in, noise, generator).to(self.device)
        return self.denormalize(self._flow(z, grid(steps), layer, solver), layer)

    def score(
        self,
        x: Acts,
        *,
        layer: Layer = None,
        noise: Acts | None = None,
        generator: Generator | None = None,
    ) -> PerRow:
        """Minus the denoising error, averaged over dimensions and over five noise levels: higher is more typical."""
        layer = self._to_device(layer)
        z, eps = self._enter(x, layer, noise, generator)

        def error(rows: Tensor, index: slice) -> Tensor:
            target = velocity_target(rows, eps[index])
            total = torch.zeros(len(rows), device=rows.device)
            for sigma in _SCORE_SIGMAS:
                v = self.denoiser(interpolate(rows, eps[index], sigma), sigma, _pick(layer, index))
                total -= ((v - target) ** 2).mean(1)
            return total / len(_SCORE_SIGMAS)

        return self._by_batch(error, z).to(x.device)

    # -- saving --------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, folder: str | Path, checkpoint: str = "final") -> Self:
        """Load a prior from a folder or a Hub id, in this library's format or that of the released GLPs.

        Args:
            checkpoint: in the released format, `final` or the name of an intermediate one (`epoch_0012`).

        Raises:
            InputError: nothing there, or files that are damaged or do not fit together.
        """
        path = released.fetch(str(folder), checkpoint)
        if not (path / released.CONFIG).is_file():
            return super().from_pretrained(path)
        config, tensors, mean, var, origin = released.read(path, checkpoint)
        return cls(_filled(config, tensors, path), mean, var, {"store": origin})

    def _config(self) -> Json:
        return {"denoiser": self.denoiser.config.to_json(), "history": self.history}

    def _tensors(self) -> dict[str, Tensor]:
        return {
            **{f"model.{name}": p for name, p in self.denoiser.state_dict().items()},
            "normalizer.mean": self.mean,
            "normalizer.var": self.var,
        }

    @classmethod
    def _restore(cls, config: Json, tensors: dict[str, Tensor]) -> Self:
        mean, var = tensors.pop("normalizer.mean"), tensors.pop("normalizer.var")
        model = cls(_filled(config["denoiser"], tensors, None), mean, var)
        model.history = config.get("history", [])
        return model

    # -- inside --------------------------------------------------------------------------------------------

    def _statistics(self, layer: Layer, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = self.mean.to(device), self.var.to(device).sqrt()
        if self.mean.ndim == 1:
            return mean, std
        index = torch.as_tensor(-1 if layer is None else layer)
        if bool(((index < 0) | (index >= len(mean))).any()):
            raise InputError(f"this prior is conditioned on the layer: pass layer=0..{len(mean) - 1}, got {layer}")
        layer = layer.to(device) if isinstance(layer, Tensor) else layer
        return mean[layer], std[layer]

    def _to_device(self, layer: Layer) -> Layer:
        return layer.to(self.device) if isinstance(layer, Tensor) else layer

    def _enter(self, x: Acts, layer: Layer, noise: Acts | None, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Normalised rows and their noise, on the model's device."""
        x = check_rows(x, self.d_in).to(self.device)
        eps = draw_noise(len(x), self.d_in, noise, generator).to(self.device)
        return self.normalize(x, layer), eps

    def _flow(self, z: Tensor, path: Tensor, layer: Layer, solver: str) -> Tensor:
        def follow(rows: Tensor, index: slice) -> Tensor:
            velocity = self.denoiser.along(path.tolist(), _pick(layer, index), None, self.device)
            return integrate(velocity, rows, path, solver)

        return self._by_batch(follow, z)

    @torch.no_grad()
    def _by_batch(self, function: Callable[[Tensor, slice], Tensor], z: Tensor) -> Tensor:
        """`function(rows, their slice)` over batches of bounded size, joined."""
        z = z.to(self.device)
        slices = [slice(i, i + _BATCH) for i in range(0, len(z), _BATCH)] or [slice(0, 0)]
        return torch.cat([function(z[s], s) for s in slices])


def _pick(value: Layer, index: slice) -> Layer:
    """The part of a per-row value that belongs to a batch; shared values pass."""
    return value[index] if isinstance(value, Tensor) and value.ndim else value


def _filled(config: Json, tensors: dict[str, Tensor], path: Path | None) -> Denoiser:
    """A denoiser with weights named as in the released checkpoints."""
    try:
        denoiser = Denoiser(DenoiserConfig(**config))
        denoiser.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items()})
    except (RuntimeError, TypeError) as error:
        line = " ".join(str(error).split())[:300]
        raise InputError(f"{path or 'checkpoint'}: weights do not fit the config ({line})") from None
    return denoiser
