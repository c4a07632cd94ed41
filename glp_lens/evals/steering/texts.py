"""Every generation with its scores: a parquet file for programs, and a page on which a person reads them."""

from __future__ import annotations

import base64
import gzip
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.evals.results import without_nan
from glp_lens.evals.steering.settings import UNSTEERED
from glp_lens.files import Kind, read_table, write_atomic, write_table

GENERATIONS = "generations.parquet"
_FILE = Kind("generations", "run glp-lens steer again")
PAGE = "texts.html"
TEXTS = ("experiment", "concept", "method", "setting", "prompt", "text", "lm_dtype")
"""Columns of text in a frame of generations."""
NUMBERS = ("strength", "score_concept", "score_fluency", "score_concept_tfidf", "nll_own", "distinct_2",
           "distinct_characters", "nll_per_byte", "nll_ngram", "slor")  # fmt: skip
"""Columns of numbers; scores from `score_concept` on may be missing, or NaN where there is none."""
COUNTS = ("prompt_index", "noise_seed")
"""Columns of whole numbers."""
COLUMNS = (*TEXTS[:4], "strength", "prompt", "prompt_index", "text", "noise_seed", "lm_dtype", *NUMBERS[1:])
"""All columns, in the order of the file."""
SHOWN = {
    "concept": "score_concept", "fluency": "score_fluency", "nll_own": "nll_own", "nll_per_byte": "nll_per_byte",
    "concept_tfidf": "score_concept_tfidf", "distinct_2": "distinct_2",
    "hosted_concept": "hosted_concept", "hosted_instruction": "hosted_instruction", "hosted_fluency": "hosted_fluency",
}  # fmt: skip
"""Scores beside each text on the page, where there are any."""


@checked
def write_generations(frame: pd.DataFrame, folder: str | Path) -> Path:
    """Write `generations.parquet`, one row a text, and return its path.

    Columns (`COLUMNS`): `experiment`, `concept`, `method` (label), `setting` (of the repair, `sigma=0.3`), `strength`
    (0 for no steering), `prompt`, `prompt_index`, `text` (without the prompt), `noise_seed`, `lm_dtype` (number format
    of the language model); `score_concept` and `score_fluency` (0 to 2), `score_concept_tfidf` (second judge),
    `nll_own` (nats a token under the unsteered model), `distinct_2`, `distinct_characters`, and by the fluency judge
    `nll_per_byte`, or `nll_ngram` and `slor`. Other columns are kept behind them.

    Raises:
        InputError: a column is missing, or holds what it should not.
    """
    path = Path(folder) / GENERATIONS
    write_table(path, _checked(frame), _FILE)
    return path


@checked
def read_generations(folder: str | Path) -> pd.DataFrame:
    """Read what `write_generations` wrote, from its folder or the file itself.

    Raises:
        InputError: no such file, or it is damaged.
    """
    path = Path(folder) / GENERATIONS if Path(folder).is_dir() else Path(folder)
    if not path.exists():
        raise InputError(f"no generations: {path} does not exist, run glp-lens steer first")
    return _checked(read_table(path, _FILE))


def _checked(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with its columns in order and of their types."""
    needed = (*TEXTS, *COUNTS, "strength")
    if absent := [name for name in needed if name not in frame.columns]:
        raise InputError(f"generations need the columns {', '.join(needed)}: {', '.join(absent)} not found")
    known = [name for name in COLUMNS if name in frame.columns]
    frame = frame[[*known, *(name for name in frame.columns if name not in COLUMNS)]]
    try:
        types: dict[str, Any] = dict.fromkeys(COUNTS, "int64")
        types |= {name: "float64" for name in NUMBERS if name in known}
        return frame.astype(types | dict.fromkeys(TEXTS, "str"))
    except (TypeError, ValueError) as error:
        raise InputError(f"generations hold what is no number: {error}") from None


@checked
def write_texts_page(frame: pd.DataFrame, folder: str | Path, *, title: str = "Steered texts", note: str = "") -> Path:
    """Write `texts.html`, on which a person reads generations side by side, and return its path.

    One file that fetches nothing: texts and scores are in it, compressed. They are put into the page as text only,
    whatever markup they contain. Its address holds what it shows (`#concept=sports&method=glp&q=goal`).

    Args:
        frame: as of `write_generations`, of one experiment or several.
        folder: made if absent.
        title: of the page.
        note: a sentence behind the numbers of texts.

    Raises:
        InputError: there are no texts, or a column is missing.
    """
    frame = _checked(frame)
    if frame.empty:
        raise InputError("no generations to show")
    template = resources.files(__package__).joinpath(PAGE).read_text(encoding="utf-8")
    text = json.dumps(without_nan(_compact(frame) | {"title": title, "note": note}), separators=(",", ":"))
    data = base64.b64encode(gzip.compress(text.encode("utf-8"), 6, mtime=0)).decode("ascii")
    path = Path(folder) / PAGE
    write_atomic(path, template.replace("@DATA@", data))
    return path


def _compact(frame: pd.DataFrame) -> dict[str, Any]:
    """The frame by columns: labels once, and for each row their places."""
    several = frame["experiment"].nunique() > 1
    concepts = frame["experiment"] + ": " + frame["concept"] if several else frame["concept"]
    steered = frame["method"] != UNSTEERED
    runs = "seed " + frame["noise_seed"].astype(str) + ", " + frame["lm_dtype"]
    run, run_names = pd.factorize(runs)
    concept, concept_names = pd.factorize(concepts)
    method, method_names = pd.factorize(frame["method"].where(steered))  # -1 for no steering
    prompt, prompt_keys = pd.factorize(frame["prompt_index"].astype(str) + "\n" + frame["prompt"])
    strengths = sorted(frame["strength"][steered].unique().tolist())
    places = {value: i for i, value in enumerate(strengths)}
    scores = {name: column for name, column in SHOWN.items() if column in frame and frame[column].notna().any()}
    return {
        "concept": list(concept_names),
        "method": list(method_names),
        "prompt": [key.split("\n", 1)[1] for key in prompt_keys],
        "strength": strengths,
        "run": list(run_names),
        "rows": {
            "concept": concept.tolist(),
            "method": method.tolist(),
            "prompt": prompt.tolist(),
            "strength": frame["strength"].map(places).fillna(-1).astype(int).tolist(),
            "run": run.tolist(),
        },
        "text": frame["text"].tolist(),
        "scores": list(scores),
        "score": {name: frame[column].round(3).tolist() for name, column in scores.items()},
    }
