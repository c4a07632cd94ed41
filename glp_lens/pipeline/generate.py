"""Generating: prompts continued along a direction, by several methods side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.evals.steering.job import SAMPLE, entries
from glp_lens.evals.steering.settings import PLAIN, UNSTEERED, ConceptName, RepairSettings
from glp_lens.pipeline.inputs import (
    LanguageModelSettings,
    RunSettings,
    load_models,
    open_language_model,
    open_training_store,
)
from glp_lens.pipeline.stages import check_output
from glp_lens.settings import option

if TYPE_CHECKING:
    from glp_lens import lm
    from glp_lens.directions import Direction
    from glp_lens.types import Json

_WIDTH = 110


@dataclass(frozen=True, kw_only=True)
class GenerateJob(RepairSettings, LanguageModelSettings, RunSettings):
    """Settings of `generate`."""

    essentials = (
        "direction", "concept", "prompt", "strength", "prior", "repairs", "store", "new_tokens", "device", "out",
    )  # fmt: skip

    panel = "Data"
    acts_with: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("repairs", "project_u", "project_sigma", "difference_sigma", "fast", "allow_mismatch"), "prior"
    )

    prompt: str = "The first thing I noticed"
    """Text to continue."""
    prompts_file: Path | None = None
    """File of texts to continue, one a line, in place of --prompt."""
    direction: Path | None = None
    """File of a steering direction: .safetensors, .gguf, .pt or .npy."""
    concept: ConceptName | None = None
    """A packaged concept, in place of --direction."""
    strength: tuple[float, ...] = (0.3, 0.6, 1.0)
    """Steering strengths, separated by commas."""
    prior: tuple[str, ...] = ()
    """Trained models that repair, separated by commas, each optionally named (glp=models/glp)."""
    store: Path = Path("acts")
    """Folder of the activation store that the models were trained on: strengths are in units of its spread."""
    allow_mismatch: bool = option(False, panel="Language model")
    """Use models trained at another hook point, on another language model or weight processing."""
    new_tokens: int = option(40, min=1, panel="Run", memory=True)
    """Tokens generated after each prompt."""
    temperature: float = option(0.0, min=0, panel="Run")
    """Of sampling; 0 takes the likeliest token. Sampled texts depend on what else is generated with them."""
    out: Path | None = option(None, panel="Run")
    """Also write the texts to this .csv, .json or .jsonl file."""
    overwrite: bool = option(False, panel="Run")
    """Replace a file that is already there."""

    def __post_init__(self) -> None:
        """Refuse what does not say which way to steer, or could not be written."""
        super().__post_init__()
        if (self.direction is None) == (self.concept is None):
            raise InputError("generate steers along --direction FILE or towards --concept NAME: pass one of them")
        if self.prompts_file is None and not self.prompt.strip():
            raise InputError("generate needs a --prompt that is not empty")
        if not self.strength or 0 in self.strength:
            raise InputError("generate needs strengths other than 0: the unsteered text is always shown")
        if self.out is not None and self.out.suffix not in (".csv", ".json", ".jsonl"):
            raise InputError(f"--out must be a .csv, .json or .jsonl file, got {self.out}")


@checked
def generate(settings: GenerateJob, *, model: lm.Model | None = None, say: Callable[[str], None] = print) -> list[Json]:
    """Continue prompts along a direction: unsteered, plain and repaired, side by side.

    Args:
        model: the language model, where it is open already.
        say: prints a line.

    Returns:
        One row a text: `prompt`, `strength`, `method`, `setting`, `text`, `nll_own` (nats a token under the unsteered
        model).

    Raises:
        InputError: a direction, model or store that cannot be used, or a file that is already there.
    """
    from glp_lens import directions, lm, provenance
    from glp_lens.evals.steering.generate import Method
    from glp_lens.evals.steering.generate import generate as continuations
    from glp_lens.evals.steering.suite import SteeringData
    from glp_lens.pipeline.ranks import matched_ranks

    if settings.out is not None:
        check_output(settings.out, overwrite=settings.overwrite)
    trained = load_models(settings.prior, settings.device) if settings.prior else {}
    store, trained, notes = open_training_store(settings.store, trained, allow_mismatch=settings.allow_mismatch)
    prompts = _prompts(settings)
    known = None if settings.direction is None else directions.read(settings.direction, settings.hook or store.hook)
    model = model or open_language_model(settings, settings.device)
    hook = lm.check_hook(model, settings.hook or store.hook)
    here = provenance.here(model, hook)
    for label, each in trained.items():
        notes += provenance.check_models({label: each}, here, allow_mismatch=settings.allow_mismatch)
    towards = known or _direction(settings, model, hook)
    for what, made in (("the store was collected", store.provenance()), ("the direction was made", towards.provenance)):
        if made.get("model"):
            notes.append(provenance.check(what, made, here, allow_mismatch=settings.allow_mismatch))
    if towards.d_in != store.d_in:
        raise InputError(f"the direction has width {towards.d_in}, the store {settings.store} {store.d_in}")
    push = SteeringData(model, hook, store.sample(SAMPLE, seed=0)).unit(settings.strength_unit) * towards.vector
    repairs = entries(trained, settings, matched_ranks(trained, store))
    ids = lm.to_ids(model, prompts, max_length=1024)
    rows = []
    for method in (
        Method(UNSTEERED, (0.0,)),
        Method(PLAIN, settings.strength, push),
        *(Method(entry.label, settings.strength, push, entry) for entry in repairs),
    ):
        wanted = [(i, alpha) for i in range(len(ids)) for alpha in method.strengths]
        for batch in continuations(
            model, method, ids, wanted, hook=hook, keys=prompts, new_tokens=settings.new_tokens,
            seed=settings.seed, temperature=settings.temperature, allow_mismatch=settings.allow_mismatch,
        ):  # fmt: skip
            rows += [
                {
                    "prompt": prompts[i], "strength": alpha, "method": method.label,
                    "setting": str(method.setting), "text": lm.decode(model, made.ids), "nll_own": made.nll_own,
                }
                for (i, alpha), made in batch.items()
            ]  # fmt: skip
    if settings.out is not None:
        _write(rows, settings.out)
    for line in [*_side_by_side(rows), *(f"note: {note}" for note in notes if note)]:
        say(line)
    if settings.out is not None:
        say(f"texts: {settings.out}")
    return rows


def _prompts(settings: GenerateJob) -> list[str]:
    if settings.prompts_file is None:
        return [settings.prompt]
    try:
        lines = settings.prompts_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompts cannot be read: {settings.prompts_file}: {error}") from None
    if not (prompts := [line for line in lines if line.strip()]):
        raise InputError(f"{settings.prompts_file} holds no prompt: expected a text file with one a line")
    return prompts


def _direction(settings: GenerateJob, model: lm.Model, hook: str) -> Direction:
    """The direction of a concept, from its packaged texts."""
    from glp_lens import directions
    from glp_lens.evals.steering import concepts

    concept = concepts.load(str(settings.concept), settings.seed)
    sides = list(concept.positive[:256]), list(concept.negative[:256])
    return directions.from_texts(model, *sides, hook, name=concept.name, seed=settings.seed, held_out=0)


def _side_by_side(rows: Sequence[Json]) -> list[str]:
    """The texts by prompt and strength, methods below each other."""
    lines: list[str] = []
    indent = max(len(row["method"]) for row in rows) + 4
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        lines += ["", prompt, "=" * min(len(prompt), _WIDTH)]
        own = [row for row in rows if row["prompt"] == prompt]
        for strength in sorted({row["strength"] for row in own}):
            lines.append(f"strength {strength:g}" if strength else "")
            for row in own:
                if row["strength"] == strength:
                    text = " ".join(row["text"].split()) or "(no text)"
                    label = f"  {row['method']}".ljust(indent)
                    lines += textwrap.wrap(label + text, _WIDTH, subsequent_indent=" " * indent)
    return lines


def _write(rows: Sequence[Json], path: Path) -> None:
    import pandas as pd

    from glp_lens.files import write_atomic

    frame = pd.DataFrame(rows)
    content = {
        ".csv": lambda: frame.to_csv(index=False),
        ".json": lambda: frame.to_json(orient="records", force_ascii=False, indent=1),
        ".jsonl": lambda: frame.to_json(orient="records", force_ascii=False, lines=True),
    }[path.suffix]()
    write_atomic(path, content)
