"""A Gaussian fitted to the activations: the best density that uses only means and covariances, in closed form.

A flow-matching model with no lower loss has learnt nothing beyond PCA.
"""

from __future__ import annotations

import math
import time
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from glp_lens import numerics
from glp_lens.activations.store import ActivationStore
from glp_lens.activations.stream import ActivationStream
from glp_lens.arguments import checked
from glp_lens.artifacts import ActivationModel, check_shapes
from glp_lens.errors import InputError
from glp_lens.interface import Featurizer, Projector, Reconstructor, Sampler, Scorer, VelocityField
from glp_lens.models.normalizer import mean_and_std
from glp_lens.models.row_checks import check_rows, draw_noise
from glp_lens.types import Acts, Features, Json, PerRow

_VARIANCE_FLOOR = 1e-6
"""Smallest eigenvalue kept, where the average is 1: directions that never vary must not divide by zero."""
_BLOCK = 4096


class Gaussian(ActivationModel, Featurizer, Reconstructor, Projector, Sampler, Scorer, VelocityField):
    """A Gaussian over standardised activations, with full or diagonal covariance `V diag(eigenvalues) V^T`.

    Attributes:
        mean, std: `(d_in,)`, of the activations; standardised rows are `(x - mean) / std`.
        eigenvalues: `(d_in,)`, of the covariance of standardised rows, largest first; they average 1.
        eigenvectors: `(d_in, d_in)`, one a column, or None for a diagonal covariance.

    Example:
        >>> import torch, glp_lens as gl
        >>> from glp_lens.activations import write_store
        >>> rows = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)).cumsum(1)
        >>> gaussian = gl.Gaussian.fit(write_store("acts", rows, hook="blocks.3.hook_resid_post"))
        >>> gaussian.sample(3).shape, gaussian.score(rows[:5]).shape
        (torch.Size([3, 8]), torch.Size([5]))
        >>> gaussian.encode(rows).T.cov().diagonal().round(decimals=1)  # whitened
        tensor([1., 1., 1., 1., 1., 1., 1., 1.])
    """

    kind: ClassVar[str] = "gaussian"
    scores_density: ClassVar[bool] = True

    def __init__(self, mean: Tensor, std: Tensor, eigenvalues: Tensor, eigenvectors: Tensor | None) -> None:
        self.mean, self.std = mean, std
        self.eigenvalues, self.eigenvectors = eigenvalues, eigenvectors
        self.d_in = len(mean)
        self.provenance = {}

    @classmethod
    @numerics.own()
    @checked
    def fit(
        cls,
        store: ActivationStore | ActivationStream,
        *,
        diagonal: bool = False,
        max_rows: int = 1_000_000,
        seed: int = 0,
    ) -> Self:
        """Estimate the covariance.

        Args:
            store: training activations, or a stream of them.
            diagonal: treat dimensions as independent; only the store's statistics are read.
            max_rows: most rows to read.
            seed: of the choice of rows.

        Raises:
            InputError: fewer than two rows.
        """
        began = time.perf_counter()
        if store.stats.count < 2 or max_rows < 2:  # of a stream, the statistics wait for its first shards
            raise InputError(f"a covariance needs at least 2 rows, got {min(len(store), max_rows)}: collect more")
        mean, std = mean_and_std(store)
        if diagonal:
            rows = len(store)
            model = cls(mean, std, (store.stats.var / std.double() ** 2).float().clamp(min=_VARIANCE_FLOOR), None)
        else:
            rows = min(len(store), max_rows)
            eigenvalues, eigenvectors = torch.linalg.eigh(_second_moment(store, mean, std, rows, seed))
            model = cls(
                mean,
                std,
                eigenvalues.flip(0).clamp(min=_VARIANCE_FLOOR).float(),
                eigenvectors.flip(1).float(),
            )
        flops = (2.0 if diagonal else 2.0 * store.d_in) * rows * store.d_in
        return model._record_fit(store.provenance(), rows=rows, flops=flops, began=began, seed=seed)

    @property
    def n_features(self) -> int:
        """As many as the activations have dimensions."""
        return self.d_in

    def normalize(self, x: Acts) -> Acts:
        """Each dimension to mean 0 and variance 1, by the training data's statistics."""
        return self._standardize(x).to(x.device)

    def denormalize(self, z: Acts) -> Acts:
        """Back to activation units."""
        return (check_rows(z, self.d_in).to(self.mean.device) * self.std + self.mean).to(z.device)

    def encode(self, x: Acts, *, noise: Acts | None = None, generator: Generator | None = None) -> Features:
        """Whitened rows `(n, d_in)`: uncorrelated, variance 1, the direction of largest variance first."""
        return (self._rotate(self._standardize(x)) / self.eigenvalues.sqrt()).to(x.device)

    def project(
        self,
        x: Acts,
        *,
        sigma: float = 0.5,
        noise: Acts | None = None,
        generator: Generator | None = None,
    ) -> Acts:
        """The posterior mean of a clean row, given that `x` is one with Gaussian noise added.

        In normalised space the observation is `z = clean + tau eps`, where `tau = sigma / (1 - sigma)` is the
        noise-to-signal ratio of the flow at `sigma`. Each eigendirection shrinks by
        `eigenvalue / (eigenvalue + tau^2)`: `sigma = 0` is the identity, `sigma = 1` gives the mean.
        """
        if not 0 <= sigma <= 1:
            raise InputError(f"sigma must be between 0 (keep) and 1 (replace by the mean), got {sigma}")
        if sigma == 0:
            return check_rows(x, self.d_in).clone()
        signal = (1 - sigma) ** 2 * self.eigenvalues
        return self.denormalize(self._scale(self._standardize(x), signal / (signal + sigma**2))).to(x.device)

    def reconstruct(
        self, x: Acts, *, sigma: float = 0.5, noise: Acts | None = None, generator: Generator | None = None
    ) -> Acts:
        """The same as `project`."""
        return self.project(x, sigma=sigma)

    def sample(self, n: int, *, noise: Acts | None = None, generator: Generator | None = None) -> Acts:
        """`n` draws: noise times the symmetric square root of the covariance.

        This is where the flow ODE of `velocity` takes that noise, so draws from shared noise are comparable.
        """
        noise = draw_noise(n, self.d_in, noise, generator).to(self.mean.device)
        return self.denormalize(self._scale(noise, self.eigenvalues.sqrt()))

    def score(self, x: Acts, *, noise: Acts | None = None, generator: Generator | None = None) -> PerRow:
        """Log-density in activation units; it ranks rows as the negative Mahalanobis distance does."""
        distance = self.encode(x).square().sum(1)
        # Sums in float64 run on the CPU: not every accelerator has the type.
        volume = self.eigenvalues.cpu().double().log().sum() + 2 * self.std.cpu().double().log().sum()
        return -0.5 * (distance + float(volume + self.d_in * math.log(2 * math.pi)))

    def velocity(self, z: Acts, sigma: float | Tensor) -> Acts:
        """The exact expected `eps - x` given `z = (1 - sigma) x + sigma eps`, if the data were Gaussian.

        By linear regression, `(sigma - (1 - sigma) eigenvalue) / ((1 - sigma)^2 eigenvalue + sigma^2)` times
        `z` along each eigendirection.
        """
        rows = check_rows(z, self.d_in).to(self.mean.device)
        s = torch.as_tensor(sigma, dtype=torch.float32).to(rows.device).reshape(-1, 1)
        variance = (1 - s) ** 2 * self.eigenvalues + s**2
        return self._scale(rows, (s - (1 - s) * self.eigenvalues) / variance).to(z.device)

    def optimal_loss(self, sigma: float) -> float:
        """Smallest flow-matching loss a dimension at `sigma` that any model of Gaussian data can reach.

        The mean over eigenvalues of `eigenvalue / ((1 - sigma)^2 eigenvalue + sigma^2)`, the variance of
        `eps - x` that `z` leaves unexplained.
        """
        values = self.eigenvalues.cpu().double()
        return float((values / ((1 - sigma) ** 2 * values + sigma**2)).mean())

    def optimal_loss_mean(self) -> float:
        """`optimal_loss` averaged over sigma uniform in [0, 1]: `pi/2` times the mean root eigenvalue."""
        return math.pi / 2 * float(self.eigenvalues.cpu().double().sqrt().mean())

    def _standardize(self, x: Acts) -> Acts:
        """`normalize`, with the result on the model's device."""
        return (check_rows(x, self.d_in).to(self.mean.device) - self.mean) / self.std

    def _rotate(self, z: Tensor) -> Tensor:
        return z if self.eigenvectors is None else z @ self.eigenvectors

    def _scale(self, z: Tensor, factor: Tensor) -> Tensor:
        """Multiply the coordinate along each eigendirection by its factor, `(d_in,)` or `(n, d_in)`."""
        scaled = self._rotate(z) * factor
        return scaled if self.eigenvectors is None else scaled @ self.eigenvectors.T

    def _config(self) -> Json:
        return {"diagonal": self.eigenvectors is None}

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"mean": self.mean, "std": self.std, "eigenvalues": self.eigenvalues}
        return tensors if self.eigenvectors is None else tensors | {"eigenvectors": self.eigenvectors}

    @classmethod
    def _restore(cls, config: Json, tensors: dict[str, Tensor]) -> Self:
        eigenvectors = None if config["diagonal"] else tensors["eigenvectors"]
        d = len(tensors["mean"])
        check_shapes(tensors, dict.fromkeys(("mean", "std", "eigenvalues"), (d,)) | {"eigenvectors": (d, d)})
        return cls(tensors["mean"], tensors["std"], tensors["eigenvalues"], eigenvectors)


def _second_moment(
    store: ActivationStore | ActivationStream, mean: Tensor, std: Tensor, rows: int, seed: int
) -> Tensor:
    """Covariance `(d_in, d_in)` of standardised rows about the store's mean, float64, read block by block."""
    total = torch.zeros(store.d_in, store.d_in, dtype=torch.float64)
    left = rows
    with tqdm(total=rows, desc="covariance", unit="row", unit_scale=True, mininterval=2) as bar:
        for block in store.batches(_BLOCK, seed=seed, epochs=1, drop_last=False):
            z = ((block[:left] - mean) / std).double()
            total.addmm_(z.T, z)
            left -= len(z)
            bar.update(len(z))
            if left == 0:
                break
    return total / (rows - left)
