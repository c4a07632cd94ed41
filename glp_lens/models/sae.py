"""Sparse autoencoders: trained by sae-lens's own trainer from our store, or published ones.

The only module that imports sae_lens, and only when one is trained or loaded.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Generator, Tensor

from glp_lens import numerics
from glp_lens.activations.store import ActivationStore
from glp_lens.activations.stream import ActivationStream
from glp_lens.arguments import checked
from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError, pass_shortage
from glp_lens.interface import Decoder, Featurizer, Projector, Reconstructor, Scorer
from glp_lens.limits import PARAMETERS, check_limit
from glp_lens.models import sae_metadata
from glp_lens.models.row_checks import check_rows
from glp_lens.training.config import DEFAULT_ROWS
from glp_lens.types import Acts, Features, Json, PerRow

if TYPE_CHECKING:
    import sae_lens

_BLOCK = 4096
_ADVICE = r"\s*This SAE has non-empty model_from_pretrained_kwargs"
"""How sae-lens begins to advise opening the language model by its own class; what it says of it is checked here, in
`sae_metadata`."""
_HELD_OUT = 100_000
"""Most rows of a held-out store that `health` is measured on."""


@dataclass(frozen=True)
class Health:
    """Quality of a sparse autoencoder on some rows.

    Attributes:
        alive: share of latents that are active on at least one row.
        l0: mean number of active latents on a row.
        fvu: fraction of variance unexplained: squared error over the squared distance to the mean row.
        n: number of rows.
    """

    alive: float
    l0: float
    fvu: float
    n: int


class SAE(ActivationModel, Featurizer, Decoder, Reconstructor, Projector, Scorer):
    """A sparse autoencoder of any architecture of sae-lens that maps rows one by one.

    Attributes:
        sae: the `sae_lens.SAE`, in float32, on raw activations.
    """

    kind: ClassVar[str] = "sae"

    def __init__(self, sae: sae_lens.SAE) -> None:
        """Wrap a `sae_lens.SAE`; rows are flat, also those of one that was trained on the outputs of heads.

        Its metadata on how it is to be used become its `provenance`, which is checked as that of any model.

        Raises:
            InputError: no `sae_lens.SAE`; the normalisation of its training is not folded into its weights; or it is no
                autoencoder of whole rows at one hook point: a transcoder, one of a single head, one that encodes whole
                sequences.
        """
        if not all(hasattr(sae, name) for name in ("cfg", "encode", "W_dec")):
            raise InputError(f"sae must be a sae_lens.SAE, got a {type(sae).__name__}: SAE.from_sae_lens opens one")
        sae_metadata.check(sae.cfg)
        self.sae = self._own(sae).eval()
        self.sae.turn_off_forward_pass_hook_z_reshaping()
        self.d_in = int(sae.cfg.d_in)
        known = sae_metadata.store(sae.cfg)
        self.provenance = {"store": known} if known else {}
        architecture = sae.cfg.architecture()
        if architecture not in sae_metadata.ROW_WISE and not self._is_row_wise():
            raise InputError(
                f"a sparse autoencoder of kind {architecture!r} does not map each row by itself: "
                f"expected one such as {', '.join(sae_metadata.ROW_WISE)}"
            )

    @classmethod
    @numerics.training()
    @checked
    def fit(
        cls,
        store: ActivationStore | ActivationStream,
        *,
        n_latents: int | None = None,
        k: int = 32,
        rows: int = DEFAULT_ROWS,
        batch_size: int = 512,
        lr: float = 2e-3,
        aux_coefficient: float = 1.0,
        dead_after_rows: int = 10_000,
        autocast: bool = True,
        validation: Acts | ActivationStore | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> Self:
        """Train a TopK autoencoder (Gao et al. 2024) with sae-lens's trainer.

        Rows are scaled to a mean norm of sqrt(d_in) for training and the scale is folded into the weights
        afterwards. The decoder bias starts at the mean row.

        Args:
            store: training activations. A stream, opened with `checkpointed=False`, is read once.
            n_latents: dictionary size; by default `4 * d_in`.
            k: latents that are active on each row.
            rows: rows to train on; more than the store holds means several epochs.
            batch_size: rows in each step.
            lr: peak learning rate of Adam; it warms up over 5% of the steps and decays over the last 20%.
            aux_coefficient: weight of the auxiliary loss that revives dead latents.
            dead_after_rows: a latent counts as dead if it was inactive on this many rows. sae-lens's default, 1,000
                steps, is longer than a short training, whose auxiliary loss would never act.
            autocast: compute in bfloat16, with float32 weights.
            validation: held-out activations; the trained model's `health` on them is kept in its provenance.
            device: torch device that it is trained on and stays on.
            seed: of the initial weights and the order of rows.

        Raises:
            InputError: an empty store, or `k` above `n_latents`.
        """
        sae_lens = _import_sae_lens()
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        n_latents = n_latents or 4 * store.d_in
        if not 1 <= k <= n_latents:
            raise InputError(f"k must be between 1 and n_latents = {n_latents}, got {k}")
        check_limit(PARAMETERS, 2 * n_latents * store.d_in, "an autoencoder's number of weights is")
        if validation is not None and len(validation) < 2:
            raise InputError(f"validation needs at least 2 rows, got {len(validation)}: collect more")
        started = time.perf_counter()
        stats = store.stats  # of a stream, this waits for its first shards
        available = rows if isinstance(store, ActivationStream) else len(store)  # a stream's length is not known yet
        if available == 0 or rows < 1:
            raise InputError(f"an SAE needs rows to train on, got a store of {available} and rows={rows}")
        batch_size = min(batch_size, available, rows)
        steps = math.ceil(rows / batch_size)
        scale = math.sqrt(store.d_in) / float(stats.mean_norm)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            untrained = sae_lens.TopKTrainingSAE(
                sae_lens.TopKTrainingSAEConfig(
                    d_in=store.d_in,
                    d_sae=n_latents,
                    k=k,
                    aux_loss_coefficient=aux_coefficient,
                    normalize_activations="expected_average_only_in",
                )
            )
        with torch.no_grad():
            untrained.b_dec.copy_(stats.mean * scale)
        batches = store.batches(batch_size, seed=seed)
        trainer = SAETrainer(
            cfg=SAETrainerConfig(
                total_training_samples=steps * batch_size,
                train_batch_size_samples=batch_size,
                lr=lr,
                lr_end=lr / 10,
                lr_warm_up_steps=steps // 20,
                lr_decay_steps=steps // 5,
                dead_feature_window=max(1, dead_after_rows // batch_size),
                device=str(device),
                autocast=autocast,
            ),
            sae=untrained,
            data_provider=iter(batches),
        )
        # Known exactly from the store's statistics, so the trainer need not estimate it from batches.
        trainer.activation_scaler.scaling_factor = scale
        try:
            trained = trainer.fit()
        finally:
            batches.close()  # with its threads
        with tempfile.TemporaryDirectory() as folder:
            trained.save_inference_model(folder)
            model = cls(sae_lens.SAE.load_from_disk(folder, device=str(device), dtype="float32"))
        parameters = sum(p.numel() for p in model.sae.parameters())
        model.provenance = {
            "store": store.provenance(),
            "training": {
                "rows_seen": steps * batch_size,
                "rows_distinct": min(steps * batch_size, len(store)),
                "parameters": parameters,
                "flops": 6.0 * parameters * steps * batch_size,
                "seconds": time.perf_counter() - started,
                "seed": seed,
                "n_latents": n_latents,
                "k": k,
                "lr": lr,
                "batch_size": batch_size,
                "aux_coefficient": aux_coefficient,
                "dead_after_rows": dead_after_rows,
                "autocast": autocast,
            },
        }
        if validation is not None:
            health = model.health(validation if isinstance(validation, Tensor) else validation.rows(0, _HELD_OUT))
            fvu = health.fvu if math.isfinite(health.fvu) else None  # of rows that are all the same
            model.provenance["training"] |= {"alive": health.alive, "l0": health.l0, "heldout_fvu": fvu}
        return model

    @classmethod
    @numerics.own()
    @checked
    def from_sae_lens(
        cls, path_or_release: str | Path, sae_id: str | None = None, *, device: str | torch.device = "cpu"
    ) -> Self:
        """Wrap an autoencoder that sae-lens can load.

        Args:
            path_or_release: a folder that sae-lens saved, or with `sae_id` the name of a published release.
            sae_id: which autoencoder of the release.
            device: where to put it.

        Raises:
            InputError: no such folder, release or id, damaged files, or what cannot be wrapped.
        """
        sae_lens = _import_sae_lens()
        if not isinstance(path_or_release, str | Path):
            raise InputError(
                "expected a folder saved by sae-lens, or a release and sae_id, got a "
                f"{type(path_or_release).__name__}: save it with its save_model and give the folder"
            )
        if sae_id is None:
            _check_saved(Path(path_or_release))
        try:
            with _without_advice():
                if sae_id is None:
                    sae = sae_lens.SAE.load_from_disk(path_or_release, device=str(device), dtype="float32")
                else:
                    sae = sae_lens.SAE.from_pretrained(str(path_or_release), sae_id, device=str(device))
        except Exception as error:  # missing or damaged files, and each converter of foreign formats, fail differently
            pass_shortage(error)
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputError(
                f"expected a folder saved by sae-lens, or a release and sae_id, got {str(path_or_release)!r} "
                f"and {sae_id!r}: {reason}"
            ) from None
        model = cls(sae)
        known = sae_metadata.store(sae.cfg)
        for caution in known.get("cautions", []):
            warnings.warn(f"the autoencoder {sae_id or path_or_release} {caution}", stacklevel=4)
        model.saved_with = {}  # sae-lens says its own version alone, among the settings
        model.provenance = {
            "source": {"sae_lens": str(path_or_release), "sae_id": sae_id},
            "store": known,
            "training": {"parameters": sum(p.numel() for p in sae.parameters())},
        }
        return model

    @classmethod
    @checked
    def from_pretrained(cls, folder: str | Path, *, revision: str | None = None) -> Self:
        """Load a saved model; one that an earlier version saved gets the provenance in its sae-lens metadata."""
        model = super().from_pretrained(folder, revision=revision)
        if known := sae_metadata.store(model.sae.cfg):
            kept = model.provenance.get("store") or {}
            about = {**known["model"], **(kept.get("model") or {})}
            model.provenance = {**model.provenance, "store": {**known, **kept, "model": about}}
        return model

    @property
    def n_features(self) -> int:
        """Number of latents."""
        return int(self.sae.cfg.d_sae)

    @torch.no_grad()
    def encode(self, x: Acts, *, noise: Acts | None = None, generator: Generator | None = None) -> Features:
        """Activations of the latents, `(n, n_features)`."""
        latents: Tensor = self.sae.encode(check_rows(x, self.d_in).to(self.sae.W_dec.device))
        return latents.to(x.device)

    @torch.no_grad()
    def decode(self, features: Features) -> Acts:
        """The rows with these activations of the latents.

        Raises:
            InputError: features of another shape, or an autoencoder that scales each row by numbers of its own, which
                latents alone do not have.
        """
        if self.sae.cfg.normalize_activations in sae_metadata.BY_ROW:
            raise InputError("this autoencoder scales each row by itself, so that latents alone give no rows")
        latents = check_rows(features, self.n_features).to(self.sae.W_dec.device)
        decoded: Tensor = self.sae.decode(latents)
        return decoded.to(features.device)

    @torch.no_grad()
    def reconstruct(
        self, x: Acts, *, k: int | None = None, noise: Acts | None = None, generator: Generator | None = None
    ) -> Acts:
        """The rows decoded from their latents.

        Args:
            x: `(n, d_in)`.
            k: keep only the k latents of each row with the largest activations; by default all that are active.
            noise, generator: not used.

        Raises:
            InputError: rows of another width, or a k that is no number of latents.
        """
        # Not by its __call__, which with sae-lens's use_error_term returns the input unchanged.
        latents: Tensor = self.sae.encode(check_rows(x, self.d_in).to(self.sae.W_dec.device))
        if k is not None:
            if not 1 <= k <= self.n_features:
                raise InputError(f"k must be a number of latents, from 1 to {self.n_features}, got {k}")
            largest = latents.topk(k, dim=1)
            latents = torch.zeros_like(latents).scatter(1, largest.indices, largest.values)
        decoded: Tensor = self.sae.decode(latents)
        return decoded.to(x.device)

    def project(self, x: Acts, *, noise: Acts | None = None, generator: Generator | None = None) -> Acts:
        """The same as `reconstruct`."""
        return self.reconstruct(x)

    def score(self, x: Acts, *, noise: Acts | None = None, generator: Generator | None = None) -> PerRow:
        """Negative squared error of reconstruction, in activation units."""
        x = check_rows(x, self.d_in)
        return -(x - self.reconstruct(x)).square().sum(1)

    @checked
    def health(self, x: Acts) -> Health:
        """Share of latents alive, mean L0 and fraction of variance unexplained on rows `x`.

        Use at least about ten thousand rows: a latent counts as alive only if it is active on one of them.

        Raises:
            InputError: no rows, or a wrong width.
        """
        if len(x) == 0:
            raise InputError("health needs at least one row, got none")
        x = check_rows(x, self.d_in).to(self.sae.W_dec.device)
        fires = torch.zeros(self.n_features, dtype=torch.int64, device=x.device)
        error = 0.0
        for rows in x.split(_BLOCK):
            fires += (self.encode(rows) != 0).sum(0)
            error -= float(self.score(rows).cpu().double().sum())
        wide = x.cpu().double()  # not every accelerator has float64
        spread = float((wide - wide.mean(0)).square().sum())
        return Health(
            alive=float((fires > 0).cpu().double().mean()),
            l0=float(fires.sum()) / len(x),
            fvu=error / spread if spread > 0 else math.nan,
            n=len(x),
        )

    @staticmethod
    def _own(sae: sae_lens.SAE) -> sae_lens.SAE:
        """The autoencoder in float32; a copy if that, or flat rows, would change the caller's own."""
        weights = sae.W_dec
        if weights.dtype == torch.float32 and sae.cfg.reshape_activations == "none":
            return sae
        state = {name: value.detach().clone() for name, value in sae.state_dict().items()}
        state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
        sae.process_state_dict_for_saving(state)
        return _from_memory(sae.cfg.to_dict() | {"dtype": "float32", "device": str(weights.device)}, state)

    def _is_row_wise(self) -> bool:
        """Whether a row gives the same result alone and in a batch; tested for unknown architectures."""
        row = torch.randn(1, self.d_in, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
        both = torch.cat([row, 10 * row])
        try:
            pairs = [(f(row), f(both)[:1]) for f in (self.encode, self.reconstruct)]
        except Exception:  # one that expects a sequence fails in a way of its own
            return False
        return pairs[1][0].shape == row.shape and all(torch.allclose(a, b, 1e-3, 1e-3) for a, b in pairs)

    def _config(self) -> Json:
        # sae-lens's own description, on the CPU whatever the device now; through JSON so that it is plain.
        config: Json = json.loads(json.dumps(self.sae.cfg.to_dict() | {"device": "cpu"}))
        return config

    def _tensors(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.sae.state_dict()
        self.sae.process_state_dict_for_saving(state)
        return state

    @classmethod
    def _restore(cls, config: Json, tensors: dict[str, Tensor]) -> Self:
        _check_sizes(config, sum(tensor.numel() for tensor in tensors.values()), "config of the autoencoder")
        model = cls(_from_memory(config, tensors))
        sae_metadata.check_types(model.sae.cfg)
        return model


def _check_saved(folder: Path) -> None:
    """Refuse a folder of sae-lens that declares more than its weights hold; what else is wrong, sae-lens tells."""
    try:
        config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
        with safe_open(folder / "sae_weights.safetensors", "pt") as file:
            held = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, ValueError, RecursionError, SafetensorError):
        return
    _check_sizes(config, held, f"{folder / 'cfg.json'}")


def _check_sizes(config: Any, held: int, place: str) -> None:
    """Refuse a description of an autoencoder whose decoder alone has more numbers than its weights.

    Raises:
        InputError: it has, and would be built before the weights are looked at.
    """
    known = config if isinstance(config, dict) else {}
    sizes = [size for name in ("d_in", "d_sae") if isinstance(size := known.get(name), int)]
    if len(sizes) == 2 and math.prod(sizes) > held:
        raise InputError(f"{place} declares d_in={sizes[0]} and d_sae={sizes[1]}, and its weights are {held:,} numbers")


def _from_memory(config: Json, tensors: dict[str, Tensor]) -> sae_lens.SAE:
    """The autoencoder of sae-lens's own description and weights."""

    def converter(*_: Any, **__: Any) -> tuple[Json, dict[str, Tensor]]:
        return json.loads(json.dumps(config)), tensors

    library = _import_sae_lens()
    with _without_advice():
        return library.SAE.load_from_disk("", device=config.get("device", "cpu"), converter=converter)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keep sae-lens from advising how to open the language model, and it alone: other warnings are shown."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _ADVICE, UserWarning)
        yield


def _import_sae_lens() -> Any:
    """The library.

    Raises:
        InputError: it is not installed.
    """
    try:
        import sae_lens
    except ModuleNotFoundError as error:
        if error.name != "sae_lens":
            raise
        raise InputError("sparse autoencoders need the package sae-lens: pip install sae-lens") from None
    return sae_lens
