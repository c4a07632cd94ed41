"""Model cards: what a model is, how it was trained, and what was measured of it, as one Markdown file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glp_lens.arguments import checked
from glp_lens.errors import InputError, one_line
from glp_lens.pipeline.report import read_results
from glp_lens.pipeline.stages import check_output
from glp_lens.pipeline.suites import TRAINED
from glp_lens.settings import Settings, option

if TYPE_CHECKING:
    from glp_lens.artifacts import ActivationModel
    from glp_lens.evals.results import Results


@dataclass(frozen=True, kw_only=True)
class CardJob(Settings):
    """Settings of `card`."""

    panel = "Card"

    saved: Path
    """Folder of a saved model."""
    results: tuple[Path, ...] = ()
    """Folders with results.json of suites that measured the model, or parents of them, or of a run of 'scale'."""
    repository: str | None = None
    """owner/name on the Hub that the card's example loads; by default the folder."""
    license: str | None = None
    """A name of the Hub's list, for example mit."""
    out: Path | None = option(None, panel="Run")
    """File for the card; by default README.md in the folder."""
    overwrite: bool = option(False, panel="Run")
    """Replace a file that is there, instead of refusing."""


@checked
def card(settings: CardJob, *, say: Callable[[str], None] = print) -> Path:
    """Write the card of a saved model, with what suites and scaling runs measured of it.

    Args:
        say: prints a line.

    Returns:
        The path of the card.

    Raises:
        InputError: no model, results that are not of it or damaged, or a card that is already there.
    """
    from glp_lens import hub, models
    from glp_lens.artifacts import CONFIG
    from glp_lens.files import write_atomic
    from glp_lens.models.released import CONFIG as RELEASED

    if settings.repository is not None:
        hub.check_id(settings.repository)
    out = settings.saved / "README.md" if settings.out is None else settings.out
    model = models.load(settings.saved)
    check_output(out, overwrite=settings.overwrite)
    sections = card_sections(model, settings.results, saved=settings.saved, say=say)
    name = settings.repository or str(settings.saved)
    released = not (settings.saved / CONFIG).exists() and (settings.saved / RELEASED).exists()
    write_atomic(out, model.card(name, license=settings.license, released=released, sections=sections))
    say(f"card: {out}")
    return out


@checked
def card_sections(
    model: ActivationModel, folders: Sequence[Path], *, saved: Path, say: Callable[[str], None] = print
) -> dict[str, str]:
    """What was measured of a model, as sections of its card: Markdown by title.

    Results say which models they are of by a hash of the weights; in those of earlier versions the label counts.

    Args:
        model: a model.
        folders: results of suites, parents of such folders, and scaling runs.
        saved: folder of the model, whose name is its label in results of earlier versions.
        say: prints a line.

    Raises:
        InputError: a folder has no results of the model, or damaged ones.
    """
    from glp_lens.report.card import measured
    from glp_lens.scaling.cells import CELL_FOLDERS, CELLS, read_cells
    from glp_lens.scaling.placing import cell_of, place

    runs: list[tuple[Results, str]] = []
    places: list[str] = []
    for folder in folders:
        within = folder
        if (folder / CELLS).exists():
            cells, inside = read_cells(folder), folder.resolve() / CELL_FOLDERS
            if inside in saved.resolve().parents:
                named = cells[cells.cell == saved.resolve().relative_to(inside).parts[0]]
                cell = named.iloc[0] if len(named) else None
            else:
                cell = cell_of(cells, model.kind, model.provenance.get("training") or {})
            if cell is None:
                raise InputError(f"no cell of {folder} is this model: pass the scaling run that it was trained in")
            places.append(place(cells, cell))
            within = inside / Path(str(cell.cell)).name
            if not any(within.glob("**/results.json")):
                continue
        runs += _own(model, within, saved.resolve().name, say)
    language_model = ((model.provenance.get("store") or {}).get("model") or {}).get("name")
    try:
        results = measured(runs, language_model)
    except InputError:
        raise
    except Exception as error:  # what was edited fails in whichever page reads it
        raise InputError(f"no card can be made of these results ({one_line(error)}): run the suites again") from error
    return {"Results": results, "Place in its scaling run": "\n\n".join(places)}


def _own(model: ActivationModel, folder: Path, name: str, say: Callable[[str], None]) -> list[tuple[Results, str]]:
    """The results in a folder that are of a model, each with its label there."""
    from glp_lens.report.card import of_model

    own: list[tuple[Results, str]] = []
    known: set[str] = set()
    weights = model.weights_hash()
    for results in read_results(folder):
        trained = results.data.get(TRAINED)
        if isinstance(trained, dict):
            labels = [label for label, each in trained.items() if each == weights]
            known |= set(trained)
        else:
            found = {metric.model for metric in results.metrics}
            labels = [name] if any(of_model(label, name) for label in found) else []
            known |= found
            if labels:
                say(f"note: results of {results.suite} do not say which models they are of: {name!r} there is taken")
        own += [(results, label) for label in labels]
    if not own:
        there = ", ".join(sorted(known)[:8]) or "none"
        raise InputError(f"{folder} has no results of this model: it was made with others (there: {there})")
    return own
