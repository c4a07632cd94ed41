"""Texts whose tokens are coloured by how odd they are: one page that fetches nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from glp_lens.evals.results import without_nan
from glp_lens.files import write_atomic

PAGE = "tokens.html"
KEYS = ("text", "position", "token", "token_id")
"""Columns of a frame of token scores that are no scores."""
_MOST = 200
"""Texts on a page, the first ones."""


def write_tokens_page(
    tokens: pd.DataFrame,
    texts: pd.DataFrame,
    path: Path,
    *,
    title: str,
    note: str = "",
    first: str | None = None,
    normal: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write the page, and return its path.

    Texts are put into it as text only, whatever markup they contain.

    Args:
        tokens: one row a token in order, with the columns `KEYS` and one for each score.
        texts: one row a text, indexed like `tokens.text`: `NAME_mean` of each score, and where known `NAME_p`.
        path: of the file.
        title, note: of the page.
        first: the score that the page opens with, if it is there.
        normal: scores of tokens of normal texts, by score; a token's colour is the share of them below it, by default
            of all tokens on the page.
    """
    names = sorted((name for name in tokens.columns if name not in KEYS), key=lambda name: name != first)
    shares = {}
    for name in names:
        known = np.sort(tokens[name].to_numpy() if normal is None else normal[name])
        known = known[np.isfinite(known)]
        place = np.searchsorted(known, tokens[name].to_numpy()) / max(len(known), 1)
        shares[name] = np.where(np.isfinite(tokens[name]), np.round(place, 3), np.nan)
    made: list[dict[str, Any]] = []
    for text, rows in list(tokens.groupby("text", sort=True).indices.items())[:_MOST]:
        about = texts.loc[text]
        made.append(
            {
                "tokens": tokens["token"].iloc[rows].tolist(),
                "shown": {name: shares[name][rows].tolist() for name in names},
                "pooled": {name: float(about[f"{name}_mean"]) for name in names},
                "p": {name: float(about[f"{name}_p"]) for name in names if f"{name}_p" in texts.columns},
            }
        )
    content = without_nan({"title": title, "note": note, "scores": names, "texts": made})
    # No "<" in the data: nothing in a text can end the element that holds it.
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = resources.files(__package__).joinpath(PAGE).read_text(encoding="utf-8")
    write_atomic(path, template.replace("@DATA@", data))
    return path
