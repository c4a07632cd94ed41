"""Texts of both classes cut to the same lengths, so that no detector can live on how long a text is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Ids = Sequence[int]
LEAST = 4
"""Fewest tokens of a text, the beginning-of-sequence token included."""


def match_lengths(
    normal: Sequence[Ids], odd: Sequence[Ids], *, normals: int, most: int, seed: int, least: int = LEAST
) -> tuple[list[list[list[int]]], list[list[int]]]:
    """Groups of `normals` normal texts and one odd text, all of a group cut on the right to its shortest.

    Of each class as many texts as needed are drawn at random and sorted by length: the shortest odd text meets the
    shortest normal ones, and so on, which cuts off the least. All parts that come back have exactly the same lengths.
    Which normal text of a group goes into which part is drawn at random: the parts are exchangeable.

    Args:
        normal, odd: token ids of the texts of both classes.
        normals: how many normal texts each odd one meets.
        most: most groups.
        seed: of both draws.
        least: groups with a text of fewer tokens are left out.

    Returns:
        `normals` lists of normal texts and one of odd texts, all of them as many and in one order.
    """
    rng = np.random.default_rng(seed)
    usable = [[ids for ids in side if len(ids) >= least] for side in (normal, odd)]
    n = min(most, len(usable[0]) // normals, len(usable[1]))
    drawn = [
        sorted((side[i] for i in rng.permutation(len(side))[:size]), key=len)
        for side, size in zip(usable, (n * normals, n), strict=True)
    ]
    parts: list[list[list[int]]] = [[] for _ in range(normals)]
    odds: list[list[int]] = []
    for i, other in enumerate(drawn[1]):
        own = drawn[0][i * normals : (i + 1) * normals]
        length = min(map(len, [*own, other]))
        for part, place in zip(parts, rng.permutation(normals), strict=True):
            part.append(list(own[place][:length]))
        odds.append(list(other[:length]))
    return parts, odds
