"""Automatic labels of features: the tokens that stand out in their examples, without any language model.

A token stands out by its log-odds in the examples against a sample of all tokens, both smoothed by a Dirichlet prior
with the proportions of that sample (Monroe et al. 2008).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from glp_lens.features.folder import FeatureFolder, ModelAbout
from glp_lens.features.sample import Sample, sample_path

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SIDES = ("top", "bottom")
"""Groups of examples that labels are made of, the second of signed features only."""
TOKENS = 6
"""Most tokens of each kind in a label."""
_Z = 3.0
"""Least standard errors by which a token's log-odds exceed 0: hundreds of tokens are compared for each feature."""
_EXAMPLES = 2
"""Fewest examples with a token: most tokens of a text are rare ones, so that one example says nothing."""
_UNSEEN = 0.5
"""Added to the count of each token in the sample."""


@dataclass(frozen=True)
class Distinctive:
    """Tokens that stand out in the examples of features, the clearest of a feature first.

    Attributes:
        feature: `(n,)`, whose token it is.
        token: `(n,)`, its id.
        log_odds: `(n,)`, above those of the sample, in nats.
    """

    feature: Ints
    token: Ints
    log_odds: Floats

    def of(self, feature: int) -> tuple[Ints, Floats]:
        """Ids and log-odds of a feature's tokens."""
        first, last = np.searchsorted(self.feature, [feature, feature + 1])
        return self.token[first:last], self.log_odds[first:last]


@dataclass(frozen=True)
class Background:
    """How often each token occurs in a sample of all tokens.

    Attributes:
        counts: `(largest id + 1,)`.
    """

    counts: Ints

    def smoothed(self, tokens: Ints) -> tuple[Floats, float]:
        """Counts of tokens and of all tokens together, with `_UNSEEN` added for each kind of token."""
        known = np.zeros(len(tokens))
        inside = tokens < len(self.counts)
        known[inside] = self.counts[tokens[inside]]
        return known + _UNSEEN, float(self.counts.sum() + _UNSEEN * np.count_nonzero(self.counts))


def log_odds(counts: Floats, total: Floats, background: Floats, background_total: float) -> tuple[Floats, Floats]:
    """Log-odds of tokens in examples above those in the background, and their standard errors, in nats.

    The examples' prior has the background's proportions and as many tokens as they have themselves.

    Args:
        counts: `(n,)`, of a token in the examples of a feature.
        total: `(n,)`, all tokens of these examples.
        background: `(n,)`, of the token in the background, above 0.
        background_total: all tokens of the background.
    """
    share = background / background_total
    seen = counts + total * share
    odds = np.log(seen) - np.log(2 * total - seen) - np.log(share) + np.log1p(-share)
    return odds, np.sqrt(1 / seen + 1 / background)


def distinctive(feature: Ints, example: Ints, token: Ints, background: Background, most: int = TOKENS) -> Distinctive:
    """The tokens that stand out of those that were seen in examples; each counts once in an example.

    Args:
        feature: `(n,)`, whose example a token was seen in.
        example: `(n,)`, number of the example.
        token: `(n,)`, its id.
        background: the sample that they are compared with.
        most: tokens of a feature.
    """
    seen = pd.DataFrame({"feature": feature, "example": example, "token": token}).drop_duplicates()
    counts = seen.groupby(["feature", "token"]).size()
    features, tokens = (counts.index.get_level_values(name).to_numpy() for name in ("feature", "token"))
    total = seen.groupby("feature").size().reindex(features).to_numpy(np.float64)
    odds, error = log_odds(counts.to_numpy(np.float64), total, *background.smoothed(tokens))
    z = odds / error
    keep = np.flatnonzero((counts.to_numpy() >= _EXAMPLES) & (z > _Z))
    keep = keep[np.lexsort((tokens[keep], -z[keep], features[keep]))]
    rank = pd.Series(keep).groupby(features[keep]).cumcount().to_numpy()
    keep = keep[rank < most]
    return Distinctive(features[keep], tokens[keep], odds[keep])


@dataclass(frozen=True)
class Windows:
    """The examples of one group, flat.

    Attributes:
        feature, peak: `(n_examples,)`, whose it is, and the id of the token that it was chosen for.
        owner, token: `(n_tokens,)`, the example that one of the other tokens is in, and its id.
    """

    feature: Ints
    peak: Ints
    owner: Ints
    token: Ints

    @classmethod
    def of(cls, examples: pd.DataFrame) -> Windows:
        """Of rows of the table of examples."""
        lengths = examples["token_ids"].str.len().to_numpy(np.int64)
        ids = np.concatenate([np.zeros(0, dtype=np.int64), *examples["token_ids"]]).astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        peaks = starts + examples["peak"].to_numpy(np.int64)
        other = np.ones(len(ids), dtype=bool)
        other[peaks] = False
        owner = np.repeat(np.arange(len(examples)), lengths)
        return cls(examples["feature"].to_numpy(np.int64), ids[peaks], owner[other], ids[other])

    def peaks(self, background: Background) -> Distinctive:
        """Tokens that the features are most active on."""
        return distinctive(self.feature, np.arange(len(self.feature)), self.peak, background)

    def context(self, background: Background) -> Distinctive:
        """Tokens around those."""
        return distinctive(self.feature[self.owner], self.owner, self.token, background)


def label(
    folder: FeatureFolder,
    models: Sequence[ModelAbout] | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the table `labels`: what the top examples of each feature have in common, by their tokens alone.

    Args:
        folder: with tables of examples and the samples of rows.
        models: of which; by default of all.
        say: prints a line.

    Raises:
        InputError: a table or sample is missing or damaged.
    """
    for model in folder.about.models if models is None else models:
        examples = folder.table(model.label, "examples")
        sample = Sample.read(sample_path(folder.path, model.hook))
        frame = table(examples, sample.token_ids)
        folder.write_table(model, "labels", frame)
        say(f"{model.label}: {(frame['label'] != '').mean():.0%} of {len(frame):,} features have distinctive tokens")


def stand_out(examples: pd.DataFrame, sample: Ints) -> dict[str, tuple[Distinctive, Distinctive]]:
    """Of `top` and `bottom` examples the tokens that features are most active on, and those around them.

    Args:
        examples: the table of that name.
        sample: token ids of a sample of all tokens.
    """
    sides = {side: Windows.of(examples[examples["group"] == side]) for side in SIDES}
    background = Background(np.bincount(sample))
    return {side: (windows.peaks(background), windows.context(background)) for side, windows in sides.items()}


def table(examples: pd.DataFrame, sample: Ints) -> pd.DataFrame:
    """The table `labels` of features with examples; a label is empty where no token stands out.

    Args:
        examples: the table of that name.
        sample: token ids of a sample of all tokens.
    """
    examples = examples[examples["group"].isin(SIDES)]
    found = stand_out(examples, sample)
    spelled = _spelled(examples)
    rows = []
    for feature in np.unique(examples["feature"].to_numpy(np.int64)).tolist():
        parts = {side: [each.of(feature) for each in own] for side, own in found.items()}
        words = {side: [[spelled[token] for token in ids.tolist()] for ids, _ in own] for side, own in parts.items()}
        (at, near), ((_, odds), (_, near_odds)) = words["top"], parts["top"]
        rows.append((feature, _sentence(words), at, odds.tolist(), near, near_odds.tolist()))
    columns = ["feature", "label", "tokens", "log_odds", "context", "context_log_odds"]
    return pd.DataFrame(rows, columns=columns).astype({"feature": np.int64, "label": str})


def _spelled(examples: pd.DataFrame) -> dict[int, str]:
    """The text of each token id that occurs in examples."""
    ids = np.concatenate([np.zeros(0, dtype=np.int64), *examples["token_ids"]])
    texts = np.concatenate([np.zeros(0, dtype=object), *examples["tokens"]])
    unique, first = np.unique(ids, return_index=True)
    return dict(zip(unique.tolist(), texts[first].tolist(), strict=True))


def _sentence(words: dict[str, list[list[str]]]) -> str:
    """One line: tokens that a feature is on at, those near them, and the same of the low end of a signed feature."""
    sides = []
    for side, (peaks, context) in words.items():
        at, near = _shown(peaks), _shown(context)
        near = [word for word in near if word.casefold() not in {each.casefold() for each in at}]
        parts = [", ".join(at)] if at else []
        parts += ["near " + ", ".join(near)] if near else []
        if parts:
            sides.append(("low: " if side == "bottom" else "") + "; ".join(parts))
    return " | ".join(sides)


def _shown(tokens: Sequence[str]) -> list[str]:
    """Tokens without spaces around them, once whatever their case; what is nothing but space as in Python."""
    shown: dict[str, str] = {}
    for token in tokens:
        word = token.strip() or repr(token)
        shown.setdefault(word.casefold(), word)
    return list(shown.values())
