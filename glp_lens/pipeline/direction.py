"""Directions: a steering direction from labelled texts, in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.evals.steering.settings import ConceptName
from glp_lens.pipeline.inputs import LanguageModelSettings, RunSettings, open_language_model
from glp_lens.pipeline.stages import check_output
from glp_lens.settings import option

if TYPE_CHECKING:
    from glp_lens import lm
    from glp_lens.directions import Direction


@dataclass(frozen=True, kw_only=True)
class DirectionJob(LanguageModelSettings, RunSettings):
    """Settings of `direction`."""

    essentials = ("concept", "positive_texts", "negative_texts", "model", "hook", "method", "out", "device")

    panel = "Data"
    acts_with: ClassVar[Mapping[str, str]] = {"text_column": "positive_texts"}

    concept: ConceptName | None = None
    """A packaged concept, in place of --positive-texts and --negative-texts."""
    positive_texts: Path | None = None
    """Texts of what to steer towards: a txt file with one text a line, or a csv, tsv, jsonl, json or parquet file."""
    negative_texts: Path | None = None
    """Texts to steer away from; --method pca pairs them with the positives in order."""
    text_column: str = "text"
    """Column of the text in a table."""
    texts_per_side: int = option(512, min=4, memory=True)
    """Most texts of each side, the first ones."""
    method: Literal["mean", "probe", "pca"] = option("mean", panel="Direction")
    """Difference of means, weights of a logistic probe, or first principal direction of the differences."""
    read: Literal["last", "mean"] = option("last", panel="Direction")
    """Activations of each text's last token, or their mean over its tokens."""
    held_out: float = option(0.2, min=0, max=0.9, panel="Direction")
    """Share of the texts that the AUROC is measured on, and that have no part in the direction."""
    name: str | None = option(None, panel="Direction")
    """What results call it; by default the concept, or the name of the file of positives."""
    context: int = option(64, min=2, panel="Language model", memory=True)
    """Most tokens of a text; longer ones are cut on the left."""
    batch_size: int = option(32, min=1, panel="Language model", memory=True)
    """Texts in one forward pass."""
    out: Path = option(Path("direction.safetensors"), panel="Run")
    """File to write: .safetensors with all that is known, .gguf for llama.cpp and repeng, .pt for steering-vectors, or
    .npy."""
    overwrite: bool = option(False, panel="Run")
    """Replace a file that is already there."""

    def __post_init__(self) -> None:
        """Refuse what does not say which texts, or could not be written."""
        super().__post_init__()
        given = [self.positive_texts is not None, self.negative_texts is not None]
        if (self.concept is None and not all(given)) or (self.concept is not None and any(given)):
            raise InputError(
                "a direction is made of --positive-texts and --negative-texts, or of --concept: pass either"
            )
        if self.out.suffix not in (".safetensors", ".gguf", ".pt", ".npy"):
            raise InputError(f"--out must be a .safetensors, .gguf, .pt or .npy file, got {self.out}")


@checked
def direction(
    settings: DirectionJob, *, model: lm.Model | None = None, say: Callable[[str], None] = print
) -> Direction:
    """Make a steering direction from two sets of texts, and measure it on others of them.

    Args:
        model: the language model, where it is open already.
        say: prints a line.

    Returns:
        The direction, which is also in the file.

    Raises:
        InputError: texts that cannot be read or give no direction, or a file that is already there or has no place for
            it.
    """
    from glp_lens import directions, lm

    check_output(settings.out, overwrite=settings.overwrite)
    name, positive, negative = _texts(settings)
    model = model or open_language_model(settings, settings.device)
    hook = lm.check_hook(model, settings.hook or lm.default_hook(model))
    made = directions.from_texts(
        model, positive, negative, hook,
        method=settings.method, name=settings.name or name, seed=settings.seed, held_out=settings.held_out,
        read=settings.read, context=settings.context, batch_size=settings.batch_size,
    )  # fmt: skip
    directions.write(settings.out, made)
    if made.auroc is not None:
        value, low, high, n = made.auroc
        say(f"held-out AUROC {value:.3f} [{low:.3f}, {high:.3f}] on {n} texts, distance {made.norm:.3g} at {hook}")
    say(f"direction: {settings.out}")
    return made


def _texts(settings: DirectionJob) -> tuple[str, list[str], list[str]]:
    """A name, the positives and the negatives."""
    n = settings.texts_per_side
    if settings.concept is not None:
        from glp_lens.evals.steering import concepts

        concept = concepts.load(settings.concept, settings.seed)
        return concept.name, list(concept.positive[:n]), list(concept.negative[:n])
    assert settings.positive_texts is not None  # both are there, see __post_init__
    assert settings.negative_texts is not None
    files = settings.positive_texts, settings.negative_texts
    sides = [_read(path, settings.text_column, n) for path in files]
    return files[0].stem, sides[0], sides[1]


def _read(path: Path, column: str, n: int) -> list[str]:
    from itertools import islice

    from glp_lens import corpus

    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"texts cannot be read: {path}: {error}") from None
        return [line for line in lines if line.strip()][:n]
    return [document.text for document in islice(corpus.from_files(path, column, piece=None), n)]
