"""The generative latent prior: a diffusion model of activations (Luo et al., 2026, arXiv 2602.06964)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from glp_lens import hub, lm, numerics, provenance
from glp_lens.activations.massive import Massive
from glp_lens.arguments import checked
from glp_lens.artifacts import CONFIG, WEIGHTS, ActivationModel, check_shapes
from glp_lens.defaults import DEFAULT_SOLVER, DEFAULT_STEPS
from glp_lens.errors import InputError
from glp_lens.files import is_number
from glp_lens.flow.guidance import Classifier, Guide
from glp_lens.flow.likelihood import LogDensity, draw_probes, log_density, rising_grid
from glp_lens.flow.path import interpolate, velocity_target
from glp_lens.flow.plan import plan
from glp_lens.flow.solvers import Velocity, integrate
from glp_lens.interface import Featurizer, Projector, Reconstructor, Sampler, Scorer, VelocityField
from glp_lens.models import released
from glp_lens.models.batching import Known, Layer, check_layer, in_batches, known, pick, untrained
from glp_lens.models.denoiser import Denoiser, DenoiserConfig
from glp_lens.models.fitting import fit, initial_denoiser
from glp_lens.models.normalizer import Normalizer
from glp_lens.models.row_checks import check_rows, draw_noise
from glp_lens.models.sources import ClassVectors, Sources, Stores, layer_of
from glp_lens.training import distributed
from glp_lens.training.config import RunOptions, TrainConfig, recipe
from glp_lens.types import Acts, Features, Json, PerRow

_SCORE_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)


class GLP(ActivationModel, Featurizer, Reconstructor, Projector, Sampler, Scorer, VelocityField):
    """A generative latent prior: a denoiser of activations, with the normaliser of its training data.

    Attributes:
        denoiser: the network, in normalised space.
        normalizer: mean and variance of each dimension, of a multi-layer prior for each layer.
        history: training curve, empty if unknown.
        layer: that a view of a multi-layer prior is bound to; see `at`.
        class_vectors: the embedding `(d_condition,)` of each class it was trained on, by the label's value.

    Example:
        >>> import torch, glp_lens as gl
        >>> from glp_lens.activations import write_store
        >>> rows = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
        >>> store = write_store("acts", rows, hook="blocks.3.hook_resid_post")
        >>> glp = gl.GLP.fit(store, gl.recipe("fast", rows=1024, batch_size=64), d_model=16, d_mlp=32)
        >>> glp.project(rows[:5], sigma=0.2).shape, glp.encode(rows[:5]).shape, glp.sample(3).shape
        (torch.Size([5, 8]), torch.Size([5, 96]), torch.Size([3, 8]))
        >>> name, hook = glp.projection_hook(sigma=0.2)  # for model.hooks(fwd_hooks=[(name, hook)])
        >>> name
        'blocks.3.hook_resid_post'
    """

    kind: ClassVar[str] = "glp"
    stochastic: ClassVar[bool] = True
    takes_dtype: ClassVar[bool] = True

    def __init__(self, denoiser: Denoiser, mean: Tensor, var: Tensor, provenance: Json | None = None) -> None:
        """Put a prior together.

        Args:
            denoiser: the network.
            mean, var: `(d_in,)`, or `(layers, d_in)` for a multi-layer prior, NaN for layers it was not trained on.
            provenance: what it was trained on.

        Raises:
            InputError: statistics of another shape than the denoiser's.
        """
        config = denoiser.config
        depth = config.multi_layer_n_layers
        shape = (config.d_input,) if depth is None else (depth, config.d_input)
        if mean.shape != shape or var.shape != shape:
            raise InputError(f"normaliser must have shape {shape}, got {tuple(mean.shape)} and {tuple(var.shape)}")
        self.denoiser = denoiser.eval().requires_grad_(False)
        self.normalizer = Normalizer(mean, var)
        self.d_in = config.d_input
        self.provenance = provenance or {}
        self.history: list[Json] = []
        self.layer: int | None = None
        self.class_vectors: ClassVectors = {}

    # -- training ------------------------------------------------------------------------------------------

    @classmethod
    @numerics.own()
    @checked
    def fit(
        cls,
        store: Stores,
        config: TrainConfig | None = None,
        *,
        d_model: int | None = None,
        d_mlp: int | None = None,
        n_layers: int = 3,
        lm_layers: int | None = None,
        device: str | torch.device = "cpu",
        validation: Acts | Stores | None = None,
        condition: str | None = None,
        vectors: Tensor | None = None,
        massive: Massive = "gap",
        run: RunOptions | None = None,
    ) -> Self:
        """Train a prior on a store, or on a stream while it is collected, which needs `RunOptions.state`.

        Several stores, siblings at different layers of one language model, give one prior that is conditioned on the
        layer; `at` binds it to one. Each batch holds rows of all layers in equal shares.

        Args:
            store: one store or stream, or several: a sequence, or the dictionary that `collect` gives.
            config: the settings of the training; by default those of `glp-lens train glp`, `recipe("fast")`.
            d_model: width of the denoiser, by default twice that of the activations, as in the paper.
            d_mlp: meta-neurons in each block, by default four times the width of the activations.
            n_layers: blocks; six in the paper.
            lm_layers: number of layers of the language model, for a prior conditioned on the layer; needed only if the
                stores do not record it.
            device: torch device that it is trained on and stays on.
            validation: held-out activations `(n, d_in)`, or stores, scored at every logging point with fixed noise.
            condition: column of the store with the class of each row, for a prior conditioned on the class. Rows whose
                label is NaN or negative have none.
            vectors: `(n_classes, d_condition)`, the embedding of class c in row c; by default one-hot vectors.
            massive: which rows are massive activations, excluded from normaliser and loss with a warning: `gap`, those
                beyond a gap in the norms; a number, those whose norm is over this many medians; None, none. Stores
                that were collected with a limit have no such rows.
            run: what does not change the result: state, intermediate models, memory, several processes.

        Raises:
            InputError: stores, labels or settings that cannot train, or a diverged loss.
        """
        config = config or recipe()
        sources = Sources.of(store, massive=massive, label=condition, vectors=vectors, lm_layers=lm_layers)
        d_in, width = sources.d_in, None
        if sources.vectors:
            width = len(next(iter(sources.vectors.values())))
        shape = DenoiserConfig(d_in, d_model or 2 * d_in, d_mlp or 4 * d_in, n_layers, sources.depth, width)
        if shape.warning and distributed.is_main():
            warnings.warn(shape.warning, stacklevel=4)
        model = cls(initial_denoiser(shape, config), *sources.statistics()).to(device)
        model.class_vectors = sources.vectors
        fit(model, sources, config, validation=_held_out(validation, condition, sources), run=run)
        return model

    @numerics.own()
    @checked
    def finetune(
        self,
        store: Stores,
        config: TrainConfig | None = None,
        *,
        validation: Acts | Stores | None = None,
        condition: str | None = None,
        vectors: Tensor | None = None,
        massive: Massive = "gap",
        run: RunOptions | None = None,
        allow_mismatch: bool = False,
    ) -> Self:
        """A new prior: a copy of this one, trained further on other activations, such as those of a chat model.

        The normaliser stays this prior's, so that both share one normalised space. The arguments are those of `fit`.

        Args:
            vectors: embeddings of the classes, of this prior's width; by default this prior's.
            allow_mismatch: accept another hook point, weight processing or number of layers.

        Raises:
            InputError: as `fit`; activations of another width; a mismatch that is not allowed; layers or a condition
                that this prior was not trained on.
        """
        config, shape = config or recipe(), self.denoiser.config
        if condition and shape.d_condition is None:
            raise InputError("this prior takes no condition, and finetuning adds none: fit one with condition=")
        known = (self.class_vectors or None) if condition and vectors is None else vectors
        sources = Sources.of(
            store, massive=massive, label=condition, vectors=known, lm_layers=shape.multi_layer_n_layers
        )
        if shape.multi_layer_n_layers is None and sources.depth is not None:
            raise InputError(f"this prior is of one layer, got {len(sources.sources)} stores: finetune it on one")
        if any(len(vector) != shape.d_condition for vector in sources.vectors.values()):
            raise InputError(f"this prior takes conditions of width {shape.d_condition}: pass vectors of that width")
        for source in sources.sources:
            view = self if source.layer is None else self.at(source.layer)
            provenance.check_finetuning(view, source.store.provenance(), allow_mismatch=allow_mismatch)
        model = copy.deepcopy(self)
        model.class_vectors = sources.vectors or self.class_vectors
        fit(
            model, sources, config, validation=_held_out(validation, condition, sources), run=run,
            finetuned_from={"weights": lm.weights_hash(self.denoiser), "provenance": self.provenance},
        )  # fmt: skip
        return model

    # -- layers of the language model ----------------------------------------------------------------------

    @checked
    def at(self, layer: int | str) -> Self:
        """The prior bound to one layer of the language model, given by number or hook point.

        The view shares the weights and can be used wherever a prior of one layer can. A prior of one layer returns
        itself, for its own layer or, where its hook point is not known, for any.

        Raises:
            InputError: a layer that it was not trained on, or a hook point of no layer.
        """
        number = layer_of(layer) if isinstance(layer, str) else layer
        if not self.layers:
            own = {layer_of(name) for name in (self.hook, *self.hook_names) if name}
            if own and number not in own:
                raise InputError(f"this prior was trained at {self.hook} alone, got {layer}: fit one on several stores")
            return self
        if number not in self.layers:
            raise untrained(layer, self.layers)
        view = copy.copy(self)
        view.layer = number
        return view

    @property
    def hook(self) -> str | None:
        """The hook point that the training activations came from; of a multi-layer prior, that of the layer bound."""
        if self.layer is None:
            return super().hook
        hooks: Json = self.provenance.get("store", {}).get("hooks", {})
        return next((hook for hook in hooks if layer_of(hook) == self.layer), None)

    @property
    def hook_names(self) -> list[str]:
        """All names of that hook point in the language model that it was collected from, where they are known."""
        names = provenance.trained_on(self).get("hook_names") or ()
        return list(names) if self.hook in names else []

    @property
    def max_norm(self) -> float | None:
        """Norm above which rows did not count in training, being massive activations."""
        return provenance.trained_on(self).get("max_norm")

    def _bound(self, layer: Layer, n: int | None = None) -> Layer:
        """The layer that is passed, checked, or else the bound one."""
        if layer is None:
            return self.layer
        some = len(self.layers) < len(self.mean)  # a layer that a prior of all layers lacks is out of range
        return check_layer(layer, n, self.layers if some else ())

    # -- normalised space ----------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """`(d_in,)`, or `(layers, d_in)` for a multi-layer prior, NaN for layers it was not trained on."""
        return self.normalizer.mean

    @property
    def var(self) -> Tensor:
        """The population variance, shaped like `mean`."""
        return self.normalizer.var

    @property
    def layers(self) -> list[int]:
        """Layers of the language model that a multi-layer prior was trained on; empty for a prior of one layer."""
        return self.normalizer.layers

    def normalize(self, x: Acts, layer: Layer = None) -> Acts:
        """Each dimension to mean 0 and variance 1, by the training data's statistics."""
        return self.normalizer.normalize(x, self._bound(layer, len(x)))

    def denormalize(self, z: Acts, layer: Layer = None) -> Acts:
        """Back to activation units."""
        return self.normalizer.denormalize(z, self._bound(layer, len(z)))

    def statistics(self, layer: Layer, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the normaliser, `(d_in,)`, or `(n, d_in)` of the layers `(n,)`.

        Raises:
            InputError: a layer that the prior has no statistics of, or none where it needs one.
        """
        return self.normalizer.statistics(self._bound(layer), device)

    def velocity(self, z: Acts, sigma: float | Tensor, layer: Layer = None, condition: Tensor | None = None) -> Acts:
        """The denoiser's prediction of `eps - x`, `(n, d_in)`, at normalised rows `z`; `sigma` is a number or `(n,)`.

        Raises:
            InputError: rows of another shape, noise levels outside [0, 1], or a layer or condition that does not fit.
        """
        rows, sigmas = check_rows(z, self.d_in).to(self.device), torch.as_tensor(sigma, dtype=torch.float32)
        if sigmas.shape not in ((), (len(rows),)) or not bool(((sigmas >= 0) & (sigmas <= 1)).all()):
            raise InputError(f"sigma must be in [0, 1], one number or one for each of {len(rows)} rows")
        sigmas, given = sigmas.to(self.device), self._known(len(rows), layer, condition)
        velocities = in_batches(lambda part, index: self.denoiser(part, pick(sigmas, index), *given[index]), rows)
        return velocities.to(z.device)

    # -- capabilities --------------------------------------------------------------------------------------

    @property
    def n_features(self) -> int:
        """Number of meta-neurons: blocks times hidden width."""
        return self.denoiser.config.n_layers * self.denoiser.config.d_mlp

    @property
    def feature_layers(self) -> int:
        """Blocks of the denoiser."""
        return self.denoiser.config.n_layers

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.denoiser.in_proj.weight.device

    @checked
    def to(self, device: str | torch.device) -> Self:
        """Move weights and normaliser to a device, in place."""
        self.normalizer.to(device)
        return super().to(device)

    def encode(
        self,
        x: Acts,
        *,
        sigma: float = 0.1,
        layer: Layer = None,
        condition: Tensor | None = None,
        noise: Acts | None = None,
        generator: Generator | None = None,
    ) -> Features:
        """Meta-neurons `(n, n_layers * d_mlp)`, layer-major, of the activations noised to `sigma`.

        The paper's probes use sigma = 0.1 (its u = 0.9).

        Args:
            x: `(n, d_in)`, in activation units.
            sigma: noise level, from 0 (data) to 1 (noise).
            layer: of the language model, for multi-layer priors: one, or `(n,)`.
            condition: as in `sample`.
            noise, generator: standard normal noise `(n, d_in)`, or where to draw it.

        Raises:
            InputError: rows, noise level, layer or condition that do not fit the prior.
        """
        if not 0 <= sigma <= 1:
            raise InputError(f"sigma must be in [0, 1]: 0 is data and 1 is noise, got {sigma}")
        z, eps = self._enter(check_rows(x, self.d_in), layer, noise, generator)
        given = self._known(len(z), layer, condition)
        return in_batches(
            lambda rows, index: self.denoiser.meta_neurons(interpolate(rows, eps[index], sigma), sigma, *given[index]),
            z,
        ).to(x.device)

    def project(
        self,
        x: Acts,
        *,
        u: float | None = None,
        sigma: float | None = None,
        steps: int = DEFAULT_STEPS,
        layer: Layer = None,
        condition: Tensor | None = None,
        guidance: float = 1.0,
        classifier: Classifier | None = None,
        classifier_scale: float = 1.0,
        noise: Acts | None = None,
        generator: Generator | None = None,
        solver: str = DEFAULT_SOLVER,
        grid: str = "released",
        fast: bool = False,
        dtype: torch.dtype | None = None,
        differentiable: bool = False,
    ) -> Acts:
        """Noise the activations, then denoise them: the paper's projection onto the manifold (section 4).

        Args:
            x: `(n, d_in)`, in activation units.
            u: the noise level as the released code counts it, an index into the grid; 0.5 if neither is given.
            sigma: the noise level itself, from 0 (returns `x`) to 1 (noise).
            steps: of the grid from noise to data; about `sigma * steps` of them are taken, with one network call each.
            layer, noise, generator: as in `encode`.
            condition, guidance, classifier, classifier_scale, solver, grid: as in `sample`.
            fast: reach the accuracy of the default with about a third of the network calls; `u` keeps its meaning.
            dtype: number format of the matrix products, by default float32. `torch.bfloat16` takes about half the time
                where the processor has instructions for it, and half as much memory again for the weights; hooks choose
                it on a stream in bfloat16, whose own rounding is larger than the difference it makes.
            differentiable: let gradients flow from the result to `x`, unless the caller has turned them off (`no_grad`,
                inference mode). Memory grows with the steps; if `denoiser.recompute` is set, each velocity is computed
                again in the backward pass instead.

        Raises:
            InputError: rows, noise level, layer, condition or solver that do not fit.
        """
        path, solver = plan(u, sigma, steps, solver, grid, fast)
        guide = Guide(condition, guidance, classifier, classifier_scale)
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            x = check_rows(x, self.d_in)
            if float(path[0]) == 0:
                return x.clone()
            z, eps = self._enter(x, layer, noise, generator)
            start = interpolate(z, eps, float(path[0]))
            end = self._flow(start, path, layer, solver, guide, dtype=dtype, differentiable=differentiable)
            return self.denormalize(end, layer).to(x.device)

    def reconstruct(
        self, x: Acts, *, noise: Acts | None = None, generator: Generator | None = None, **options: float
    ) -> Acts:
        """The same as `project`."""
        return self.project(x, noise=noise, generator=generator, **options)  # type: ignore[arg-type]

    def sample(
        self,
        n: int,
        *,
        steps: int = DEFAULT_STEPS,
        layer: Layer = None,
        condition: Tensor | None = None,
        guidance: float = 1.0,
        classifier: Classifier | None = None,
        classifier_scale: float = 1.0,
        noise: Acts | None = None,
        generator: Generator | None = None,
        solver: str = DEFAULT_SOLVER,
        grid: str = "released",
        fast: bool = False,
    ) -> Acts:
        """`n` activations `(n, d_in)`, drawn by integrating the flow from noise to data in `steps` steps.

        Args:
            condition: `(d_condition,)`, or `(n, d_condition)`, NaN in a row for none; for priors trained with one.
            guidance: weight of the condition: 1 as trained, 0 without it, more than 1 to exaggerate it.
            classifier: a differentiable function of activations `(n, d_in)` on the model's device to scores `(n,)`,
                each row by itself, for example log-probabilities of a probe. Draws are those of the prior's density
                times `exp(classifier_scale * score)`, up to the approximation of `flow.guidance`.
            solver: a name in `flow.solvers.SOLVERS`.
            grid: how the noise levels are spaced: `released`, or a name in `flow.schedule.SPACINGS`.
            fast: reach the accuracy of the default with about a third of the network calls; steps, solver and grid are
                those of `flow.plan.FAST`.

        Raises:
            InputError: noise, layer, condition or solver that do not fit.
        """
        guide = Guide(condition, guidance, classifier, classifier_scale)
        z = draw_noise(n, self.d_in, noise, generator).to(self.device)
        path, solver = plan(0.0, None, steps, solver, grid, fast)
        return self.denormalize(self._flow(z, path, layer, solver, guide), layer)

    def score(
        self,
        x: Acts,
        *,
        method: Literal["denoising", "ode"] = "denoising",
        steps: int = 64,
        probes: int | None = None,
        layer: Layer = None,
        condition: Tensor | None = None,
        noise: Acts | None = None,
        generator: Generator | None = None,
    ) -> PerRow:
        """How typical each row is, `(n,)`: higher is more typical.

        Args:
            method: `denoising`, minus the denoising error averaged over dimensions and over five noise levels; or
                `ode`, the log-density in activation units.
            steps, probes: of `ode`; see `log_density`.

        Raises:
            InputError: another method, or rows, layer or condition that do not fit.
        """
        if method == "ode":
            return self.log_density(
                x, steps=steps, probes=probes, layer=layer, condition=condition, noise=noise, generator=generator
            ).value
        if method != "denoising":
            raise InputError(f"method must be 'denoising' or 'ode', got {method!r}")
        z, eps = self._enter(check_rows(x, self.d_in), layer, noise, generator)
        given = self._known(len(z), layer, condition)

        def error(rows: Tensor, index: slice) -> Tensor:
            target = velocity_target(rows, eps[index])
            total = torch.zeros(len(rows), dtype=rows.dtype, device=rows.device)
            for sigma in _SCORE_SIGMAS:
                v = self.denoiser(interpolate(rows, eps[index], sigma), sigma, *given[index])
                total -= ((v - target) ** 2).mean(1)
            return total / len(_SCORE_SIGMAS)

        return in_batches(error, z).to(x.device)

    @numerics.own()
    @checked
    def log_density(
        self,
        x: Acts,
        *,
        steps: int = 64,
        probes: int | None = None,
        layer: Layer = None,
        condition: Tensor | None = None,
        noise: Acts | None = None,
        generator: Generator | None = None,
    ) -> LogDensity:
        """Log-density in activation units by the probability-flow ODE, and its standard error, `(n,)` each.

        The density is of the data with Gaussian noise of a thousandth of a standard deviation; see `flow.likelihood`.

        Args:
            steps: evaluations of the velocity, on a grid that is finer near the data; the third-order solver is used.
            probes: random directions that estimate the divergence; 0 for the exact trace, which costs a derivative
                for each dimension. By default exact up to 64 dimensions, and 16 probes above.
            noise: if the trace is not exact, its signs are the only probe.
        """
        rows, sigmas = check_rows(x, self.d_in).to(self.device), rising_grid(steps)
        given, signs = self._known(len(x), layer, condition), draw_probes(len(x), self.d_in, probes, noise, generator)

        def density(rows: Tensor, index: slice) -> Tensor:
            velocity = self.denoiser.along(sigmas.tolist(), *given[index], self.device)
            own = None if signs is None else signs[index].to(self.device)
            return torch.stack(log_density(velocity, rows, sigmas, own), dim=1)

        directions = self.d_in if signs is None else signs.shape[1]
        estimates = in_batches(density, self.normalize(rows, layer), copies=directions)
        value, error = estimates.to(x.device).unbind(1)
        volume = self.statistics(layer, torch.device("cpu"))[1].double().log().sum(-1)
        return LogDensity(value - volume.to(value), error)

    # -- saving --------------------------------------------------------------------------------------------

    @classmethod
    @numerics.own()
    @checked
    def from_pretrained(cls, folder: str | Path, checkpoint: str = "final", *, revision: str | None = None) -> Self:
        """Load a prior from a folder or a Hub id, in this library's format or that of the released GLPs.

        Args:
            checkpoint: `final`, or the name of an intermediate one (`step_00000512`; in released priors `epoch_0012`).
            revision: branch, tag or commit of a Hub repository.

        Raises:
            InputError: nothing there, files that are damaged or do not fit together, or no network.
        """
        checkpoint = released.check_checkpoint(checkpoint)
        within = "" if checkpoint == "final" else f"checkpoints/{checkpoint}/"
        path = hub.fetch(folder, [within + CONFIG, released.CONFIG], revision=revision)
        if (path / within / CONFIG).is_file():
            path = hub.fetch(folder, [within + CONFIG, within + WEIGHTS], revision=revision)
            return super().from_pretrained(path / within)
        if not (path / released.CONFIG).is_file():
            there = sorted(p.parent.name for p in path.glob(f"checkpoints/*/{CONFIG}"))
            known = f": there are {', '.join(there)}" if there else ""
            raise InputError(f"checkpoint {checkpoint!r} not found in {folder}{known}")
        path = hub.fetch(folder, released.files(checkpoint), revision=revision)
        config, tensors, mean, var, origin, saved_with = released.read(path, checkpoint)
        prior = cls(Denoiser.filled(config, tensors, str(path)), mean, var, origin)
        prior.saved_with = saved_with
        return prior

    @checked
    def save_released(self, folder: str | Path, checkpoint: str = "final", *, layer_prefix: str | None = None) -> Path:
        """Write the prior in the format of the released GLPs, which their code can read; without the training curve.

        Args:
            checkpoint: `final`, or the name of an intermediate one (`epoch_0012`) of the same prior.
            layer_prefix: name of the list of blocks in the language model's transformers class: mostly
                `model.layers`, in GPT-2 `transformer.h`. By default the name that was recorded when collecting, or
                with a warning `model.layers`.

        Raises:
            InputError: conditioned on a vector or on the only layer, trained on processed weights or at a hook point
                that is not the input or output of a block, or a folder that holds a model in the other format.
        """
        tensors = {name: t for name, t in self._tensors().items() if name.startswith("model.")}
        name, shape = released.check_checkpoint(checkpoint), self.denoiser.config.to_json()
        released.write(Path(folder), name, shape, tensors, self.mean, self.var, self.provenance, layer_prefix)
        return Path(folder)

    def _writers(self) -> dict[str, Callable[..., Path]]:
        return {**super()._writers(), "released": self.save_released}

    def _config(self) -> Json:
        return {
            "denoiser": self.denoiser.config.to_json(),
            "history": self.history,
            "classes": sorted(self.class_vectors),
        }

    def _tensors(self) -> dict[str, Tensor]:
        classes = [self.class_vectors[value] for value in sorted(self.class_vectors)]
        return {
            **({"classes": torch.stack(classes)} if classes else {}),
            **{f"model.{name}": p for name, p in self.denoiser.state_dict().items()},
            "normalizer.mean": self.mean,
            "normalizer.var": self.var,
        }

    @classmethod
    def _restore(cls, config: Json, tensors: dict[str, Tensor]) -> Self:
        mean, var = tensors.pop("normalizer.mean"), tensors.pop("normalizer.var")
        classes = dict(zip(config.get("classes", []), tensors.pop("classes", []), strict=True))
        model = cls(Denoiser.filled(config["denoiser"], tensors), mean, var)
        width, history = model.denoiser.config.d_condition, config.get("history", [])
        check_shapes(classes, dict.fromkeys(classes, (width,)))
        if not (isinstance(history, list) and all(isinstance(each, dict) for each in history)):
            raise ValueError("its history is no list of objects")
        if not all(map(is_number, classes)):
            raise ValueError("its classes are no numbers")
        model.class_vectors = classes
        model.history = history
        return model

    # -- inside --------------------------------------------------------------------------------------------

    def _known(self, n: int, layer: Layer, condition: Tensor | None) -> Known:
        """Layer and condition of `n` rows, on the model's device."""
        return known(n, self._bound(layer, n), condition, self.device)

    def _enter(self, x: Acts, layer: Layer, noise: Acts | None, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Rows that were checked, normalised, and their noise, on the model's device."""
        eps = draw_noise(len(x), self.d_in, noise, generator).to(self.device)
        return self.normalize(x.to(self.device), layer), eps

    def _flow(
        self,
        z: Tensor,
        path: Tensor,
        layer: Layer,
        solver: str,
        guide: Guide,
        *,
        dtype: torch.dtype | None = None,
        differentiable: bool = False,
    ) -> Tensor:
        given, levels = self._known(len(z), layer, guide.condition), guide.levels(path.tolist())

        def follow(rows: Tensor, index: slice) -> Tensor:
            own, condition = given[index]

            def along(condition: Tensor | None) -> Velocity:
                velocity = self.denoiser.along(levels, own, condition, self.device, dtype)
                if differentiable and self.denoiser.recompute:
                    return partial(checkpoint, velocity, use_reentrant=False)
                return velocity

            velocity = guide.lead(along, condition, partial(self.denormalize, layer=own))
            return integrate(velocity, rows, path, solver)

        return in_batches(follow, z.to(self.device), differentiable=differentiable)


def _held_out(validation: Acts | Stores | None, label: str | None, sources: Sources) -> Acts | Sources | None:
    """Validation rows, or opened stores with the classes of the training."""
    if validation is None or isinstance(validation, Tensor):
        return validation
    return Sources.of(validation, label=label, vectors=sources.vectors or None, lm_layers=sources.depth)
