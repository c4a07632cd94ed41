"""The page of features from a small local server, which reads texts that are pasted into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glp_lens.arguments import checked
from glp_lens.defaults import DEFAULT_DEVICE
from glp_lens.pipeline.features.inputs import FolderModelsSettings, open_models
from glp_lens.pipeline.inputs import ContextSettings, OpeningSettings, open_language_model
from glp_lens.settings import option

if TYPE_CHECKING:
    from glp_lens import lm
    from glp_lens.features.serve import Server


@dataclass(frozen=True, kw_only=True)
class ServeFeaturesJob(FolderModelsSettings, OpeningSettings, ContextSettings):
    """Settings of `features serve`."""

    essentials = ("built", "models", "model", "device", "port")

    panel = "Run"

    allow_mismatch: bool = option(False, panel="Language model")
    """Use other models or another language model than the features were built with."""
    device: str = DEFAULT_DEVICE
    """Torch device: cpu, cuda, mps."""
    port: int = option(8765, min=0, max=65535)
    """Port to listen at, on 127.0.0.1 only; 0 takes a free one."""


@checked
def serve_features(
    settings: ServeFeaturesJob,
    *,
    model: lm.Model | None = None,
    say: Callable[[str], None] = print,
    run: Callable[[Server], None] = lambda server: server.serve_forever(),
) -> None:
    """Serve the page of features to this machine, where a text that is pasted shows its features token by token.

    It answers its own page only, writes nothing, and ends with Ctrl-C.

    Args:
        model: the language model, where it is open already.
        say: prints a line.
        run: runs the server to its end.

    Raises:
        InputError: no features or page, models that cannot be used, or a port that cannot be had.
    """
    from glp_lens.features import FeatureFolder
    from glp_lens.features.page import PAGE
    from glp_lens.features.serve import ADDRESS, Reader, Server, page_that_asks
    from glp_lens.lm import check_device

    folder = FeatureFolder.open(settings.built)
    page = page_that_asks(folder.path / PAGE)
    check_device(settings.device)
    model = model or open_language_model(settings, settings.device)
    trained, notes = open_models(
        folder, model, settings.models, settings.device, allow_mismatch=settings.allow_mismatch
    )
    for note in notes:
        say(f"note: {note}")
    with Server(Reader(folder, model, trained, settings.context), page, settings.port) as server:
        say(f"features: http://{ADDRESS}:{server.server_address[1]}/ (Ctrl-C ends it)")
        try:
            run(server)
        except KeyboardInterrupt:
            say("ended")
