"""Sending the training curve to a dashboard. Nothing is sent unless a logger is chosen by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from glp_lens.errors import InputError
from glp_lens.types import Json

PROJECT = "glp-lens"


class Logger(Protocol):
    """A dashboard that entries of a history are sent to."""

    def log(self, entry: Json) -> None:
        """Send an entry, at its step."""

    def close(self) -> None:
        """Send everything that is still buffered."""


class _Tracker:
    """trackio or wandb, whose interfaces agree in these calls."""

    def __init__(self, module: Any, run: str, config: Json) -> None:
        self._module = module
        module.init(project=PROJECT, name=run, config=config)

    def log(self, entry: Json) -> None:
        self._module.log(_values(entry), step=entry["step"])

    def close(self) -> None:
        self._module.finish()


class _TensorBoard:
    """Event files in the model's folder, with the settings as text."""

    def __init__(self, writer: Any, config: Json) -> None:
        self._writer = writer
        writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()))

    def log(self, entry: Json) -> None:
        for name, value in _values(entry).items():
            self._writer.add_scalar(name, value, entry["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _trackio(folder: Path, config: Json) -> Logger:
    import trackio

    return _Tracker(trackio, folder.name, config)


def _wandb(folder: Path, config: Json) -> Logger:
    import wandb

    return _Tracker(wandb, folder.name, config)


def _tensorboard(folder: Path, config: Json) -> Logger:
    from torch.utils.tensorboard import SummaryWriter

    return _TensorBoard(SummaryWriter(str(folder / "tensorboard")), config)


LOGGERS: dict[str, Callable[[Path, Json], Logger]] = {
    "trackio": _trackio,
    "wandb": _wandb,
    "tensorboard": _tensorboard,
}


def open_logger(name: str, folder: str | Path, config: Json) -> Logger:
    """A logger by its name; its library is imported now.

    Args:
        folder: of the model; the run is named after it, and TensorBoard's files lie in it.
        config: settings of the training, kept with the run.

    Raises:
        InputError: no logger of that name, or its library is not installed.
    """
    if name not in LOGGERS:
        raise InputError(f"logger must be one of {', '.join(LOGGERS)}, got {name!r}")
    try:
        return LOGGERS[name](Path(folder).resolve(), config)
    except ImportError:
        raise InputError(f"logger {name!r} is not installed: pip install {name}, or leave the logger out") from None


def _values(entry: Json) -> dict[str, float]:
    """The values to plot; parts of a loss by noise level are grouped under its name."""
    return {name.replace(":", "/"): value for name, value in entry.items() if name != "step"}
