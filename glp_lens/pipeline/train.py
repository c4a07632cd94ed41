"""Training one model of activations from a store: the job behind `glp-lens train`, `compare` and the library."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from glp_lens.arguments import checked
from glp_lens.errors import InputError, or_warning
from glp_lens.kinds import KINDS, Fit, kind_of
from glp_lens.limits import LARGEST_SEED
from glp_lens.settings import Settings, option, options

if TYPE_CHECKING:
    from glp_lens.activations import ActivationStore, ActivationStream
    from glp_lens.artifacts import ActivationModel
    from glp_lens.types import Json

    Store = ActivationStore | ActivationStream
    Trainable = str
else:
    Trainable = Literal[tuple(name for name, kind in KINDS.items() if kind.fit)]

STATE = "training.state"
CHECKPOINTS = "checkpoints"
PICTURE = "loss.png"
_FITS = dict.fromkeys(kind.fit for kind in KINDS.values() if kind.fit and kind.fit is not Fit)


def _trainable(name: str) -> str:
    """The kind, refused if nothing of it is trained."""
    if kind_of(name).fit is None:
        raise InputError(f"{name} need no training: 'glp-lens probe --{name}' reads them")
    return name


def _owners(name: str) -> list[str]:
    """The kinds that a setting belongs to; none of what all kinds share."""
    return [kind for kind, row in KINDS.items() if row.fit and name in {each.name for each in options(row.fit)}]


@dataclass(frozen=True, kw_only=True)
class _Shared(Settings):
    """Settings of every kind."""

    panel: ClassVar[str] = "Run"

    kind: Trainable = option(parse=_trainable)
    """Kind of model."""
    store: tuple[Path, ...] = option((Path("acts"),), panel="Data")
    """Folder of an activation store, written by 'collect'; for a GLP of several layers their folders, or the folder
    they are in."""
    out: Path | None = None
    """Folder for the model; by default models/KIND."""
    wait: bool = False
    """Wait for a store that is not there yet: a stream whose collector is starting."""
    device: str = "cpu"
    """Torch device: cpu, cuda, mps."""
    seed: int = option(0, min=0, max=LARGEST_SEED)
    """Of every random choice: same seed, same numbers on one machine."""
    overwrite: bool = False
    """Replace a model that is already there."""


@dataclass(frozen=True, kw_only=True)
class TrainJob(*reversed(_FITS), _Shared):  # type: ignore[misc]
    """Settings of a training: those of every kind, and those of each, which are refused for the others."""

    essentials = (
        "store", "rows", "recipe", "d_model", "d_mlp", "n_layers", "n_latents", "k", "validation", "device", "out",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Refuse settings that do not fit together.

        Raises:
            InputError: settings that no training can have, or that are of another kind of model.
        """
        super().__post_init__()
        if self.checkpoint and not self.finetune:
            raise InputError("--checkpoint is of the prior to --finetune, and there is none: name it, or leave it out")
        if self.kind != "glp" and len(self.validation) > 1:
            raise InputError(f"a {self.kind} is validated on one store, got {len(self.validation)}: name one")
        if self.finetune and (self.d_model or self.d_mlp or self.n_layers):
            raise InputError("a prior that is finetuned keeps its shape: leave out --width, --mlp and --layers")

    def refuse_ignored(self, given: Collection[str]) -> None:
        """Refuse settings of other kinds of model, too."""
        super().refuse_ignored(given)
        for known in options(type(self)):
            if known.name in given and not self._takes(known.name):
                kinds = " or ".join(map(str.upper, _owners(known.name)))
                raise InputError(f"{known.flag} is an option of a {kinds}, not of kind {self.kind!r}: leave it out")

    def memory_flags(self) -> list[str]:
        """The options of this kind that lower how much memory a training takes."""
        return [each.flag for each in options(type(self)) if each.memory and self._takes(each.name)]

    def _takes(self, name: str) -> bool:
        """Whether a setting is one of this kind, or of all."""
        return self.kind in (owners := _owners(name)) or not owners

    @property
    def folder(self) -> Path:
        """Where the model is saved."""
        return self.out or Path("models") / self.kind


@checked
def train(settings: TrainJob, *, say: Callable[[str], None] = print) -> ActivationModel:
    """Train a model of activations (a GLP, an SAE or a baseline) on a store, and save it.

    The folder of a GLP also holds its training curve, as a table and a picture, and its checkpoints. An interrupted
    training of a GLP continues when the same command is run again.

    On several GPUs: torchrun --nproc-per-node 8 -m glp_lens_cli train glp --device cuda ...

    Args:
        say: prints a line: where the model was saved and what it was trained on.

    Raises:
        InputError: settings, stores or a device that cannot be used, a folder that holds a model or is being trained
            in, or a diverged loss.
    """
    from glp_lens import provenance
    from glp_lens.activations.writer import locked
    from glp_lens.artifacts import CONFIG
    from glp_lens.lm import check_device
    from glp_lens.training import distributed

    kind, folder = settings.kind, settings.folder
    # An interrupted training has its state, even if the model is there: then only the end is left to do.
    goes_on = kind == "glp" and (folder / STATE).exists()
    if (folder / CONFIG).exists() and not goes_on and not settings.overwrite:
        raise InputError(f"{folder} already holds a model: choose another --out, or pass --overwrite")
    check_device(settings.device)
    with distributed.session(settings.device):
        if distributed.running() and kind != "glp":
            raise InputError(f"several processes train a GLP together, not a {kind}: run it without torchrun")
        stores = [_open(path, kind, wait=settings.wait) for path in _folders(settings.store)]
        if len(stores) > 1 and kind != "glp":
            raise InputError(f"a {kind} is trained on one store, got {len(stores)}: only a GLP takes siblings")
        held_out = _open_validation(settings, stores)
        # A folder that cannot be written must fail before the training; of several processes the main one locks it.
        with locked(folder) if distributed.is_main() else nullcontext():
            model = (_fit_glp if kind == "glp" else _fit)(settings, stores, held_out)
            if distributed.is_main():
                model.save_pretrained(folder)
                if kind == "glp":
                    _draw_curve(folder)
                (folder / STATE).unlink(missing_ok=True)
                say(f"saved {kind}: {folder}")
                say(provenance.describe(model))
                if settings.device != "cpu" and kind != "glp" and "device" not in _keywords(type(model)):
                    say(f"note: --device is not used for a {kind}: it is fitted on the CPU")
            distributed.barrier()
    return model


def _folders(given: Sequence[Path]) -> list[Path]:
    """Folders of stores: those named, or the siblings in the one named."""
    from glp_lens.activations.manifest import MANIFEST

    if len(given) == 1 and not (given[0] / MANIFEST).is_file():
        return sorted(path.parent for path in given[0].glob(f"*/{MANIFEST}")) or list(given)
    return list(given)


def _open(folder: Path, kind: str, *, wait: bool) -> Store:
    """A store, or a stream while it is collected."""
    from glp_lens.activations import ActivationStore, ActivationStream
    from glp_lens.activations.manifest import MANIFEST, Manifest
    from glp_lens.activations.waiting import wait_until

    if wait:
        wait_until(lambda: (folder / MANIFEST).is_file() or None, lambda: f"waiting for a store in {folder}")
    if not (folder / MANIFEST).is_file() or Manifest.read(folder).window is None:
        return ActivationStore.open(folder)
    if not kind_of(kind).streams:
        raise InputError(f"{folder} is a stream, which a {kind} cannot be fitted on: collect a store without --window")
    # The SAE's trainer keeps no checkpoint, so what it has read is used up.
    return ActivationStream.open(folder, checkpointed=kind == "glp")


def _open_validation(settings: TrainJob, stores: Sequence[Store]) -> list[ActivationStore]:
    """The held-out stores, refused if they hold other activations than the training stores."""
    from glp_lens import provenance
    from glp_lens.activations import ActivationStore

    held_out = [ActivationStore.open(folder) for folder in _folders(settings.validation)]
    by_hook = {store.hook: store for store in held_out}
    for store in stores if held_out else ():
        like = by_hook.get(store.hook, held_out[0])
        provenance.check(
            f"{store.path} was collected",
            store.provenance(),
            like.provenance(),
            remedy=f"collect {like.path} the same way",
            allow_mismatch=settings.allow_mismatch,
        )
    return held_out


def _keywords(cls: Any) -> Collection[str]:
    return inspect.signature(cls.fit).parameters


def _fit(settings: TrainJob, stores: Sequence[Store], held_out: Sequence[ActivationStore]) -> ActivationModel:
    """A model of any kind but a GLP: all its settings are keywords of its `fit`; those that are None stay its own."""
    from glp_lens import models

    cls: Any = models.model_class(settings.kind)
    given = {known.name: getattr(settings, known.name) for known in options(kind_of(settings.kind).fit or Fit)}
    given |= {name: getattr(settings, name) for name in ("device", "seed") if name in _keywords(cls)}
    given.pop("allow_mismatch", None)  # of the stores, which were checked
    if "validation" in given:
        given["validation"] = held_out[0] if held_out else None
    model: ActivationModel = cls.fit(stores[0], **{name: value for name, value in given.items() if value is not None})
    return model


def _fit_glp(settings: TrainJob, stores: Sequence[Store], held_out: Sequence[ActivationStore]) -> ActivationModel:
    """A new prior, or one that is finetuned; its training curve is kept in the folder on the way."""
    from glp_lens.models.glp import GLP
    from glp_lens.training import distributed
    from glp_lens.training.config import RunOptions, recipe

    folder, device = settings.folder, distributed.device(settings.device)
    changes = ("batch_size", "lr", "optimizer", "ema", "accumulate", "seed")
    config = recipe(settings.recipe, settings.rows, **{name: getattr(settings, name) for name in changes})
    if distributed.is_main():
        _clear(folder, overwrite=settings.overwrite)
    distributed.barrier()
    with _curve(folder, settings.logger, asdict(config)) as note:
        run = RunOptions(
            state=folder / STATE, checkpoints=folder / CHECKPOINTS, snapshots=settings.checkpoints, on_entry=note,
            recompute=settings.recompute, shard_weights=settings.shard_weights,
        )  # fmt: skip
        given: dict[str, Any] = {
            "validation": held_out or None, "condition": settings.condition, "massive": settings.massive, "run": run,
        }  # fmt: skip
        source = stores if len(stores) > 1 else stores[0]
        if settings.finetune:
            start = GLP.from_pretrained(settings.finetune, settings.checkpoint or "final").to(device)
            return start.finetune(source, config, allow_mismatch=settings.allow_mismatch, **given)
        shape = {name: n for name in ("d_model", "d_mlp", "n_layers") if (n := getattr(settings, name))}
        return GLP.fit(source, config, device=device, **shape, **given)


def _clear(folder: Path, *, overwrite: bool) -> None:
    """Remove what an earlier training left, unless this one continues it."""
    from glp_lens.training import checkpoint
    from glp_lens.training.history import FILE, write_history

    if (folder / STATE).exists():
        if known := checkpoint.history(folder / STATE):
            write_history(folder, known)  # whatever curve lies there, damaged or of another training
        return
    (folder / FILE).unlink(missing_ok=True)
    if overwrite:
        for old in (folder / CHECKPOINTS).glob("step_*"):
            shutil.rmtree(old)


@contextmanager
def _curve(folder: Path, logger: str | None, config: Json) -> Iterator[Callable[[Json], None]]:
    """A function to call with each entry of the training curve, which is drawn after a failure."""
    from glp_lens.training import distributed
    from glp_lens.training.history import add_to_history
    from glp_lens.training.loggers import open_logger

    sink = open_logger(logger, folder, config) if logger and distributed.is_main() else None

    def note(entry: Json) -> None:
        add_to_history(folder, entry)
        if sink:
            sink.log(entry)

    try:
        yield note
    except BaseException:
        if distributed.is_main():
            with suppress(OSError):  # the failure is what is told
                _draw_curve(folder)
        raise
    finally:
        if sink:
            sink.close()


def _draw_curve(folder: Path) -> None:
    """Draw the training curve in a folder that has one."""
    from glp_lens.report.plots import loss_curve
    from glp_lens.training.history import FILE, read_history

    def draw() -> None:
        loss_curve(read_history(folder), folder / PICTURE, title="Training of the GLP")

    if (folder / FILE).exists():
        or_warning(PICTURE, draw)
