"""Drop the damaged shards of a store, so that the rest can be used and what is lost collected again."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from glp_lens.activations.manifest import MANIFEST, Manifest, Shard
from glp_lens.activations.shard import no_space
from glp_lens.activations.store import damaged_shards
from glp_lens.activations.writer import lock, publish
from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.files import remove_abandoned


@checked
def repair(folder: str | Path) -> list[Shard]:
    """Drop every shard that is missing or differs from what was written; reads the whole store.

    A damaged file is kept under the name `shard-XXXXXXXX.h5.damaged`. The same `collect` as before collects the
    dropped shards again, and no others.

    Returns:
        The shards dropped.

    Raises:
        InputError: no store there, or its manifest is damaged; a stream; another process is writing to it.
    """
    folder = Path(folder)
    if Manifest.read(folder).window is not None:
        raise InputError(f"{folder} is a stream, whose shards are deleted once used: there is nothing to repair")
    held = lock(folder)
    try:
        remove_abandoned(folder, f".{MANIFEST}.")  # of a killed repair; without damage, no manifest is written here
        manifest = Manifest.read(folder)  # again, under the lock
        damaged = damaged_shards(folder, manifest)
        if damaged:
            lost = {shard.index for shard in damaged}
            with no_space(folder):
                for shard in damaged:
                    if os.path.lexists(folder / shard.name):
                        os.replace(folder / shard.name, folder / f"{shard.name}.damaged")
            kept = tuple(shard for shard in manifest.shards if shard.index not in lost)
            publish(folder, replace(manifest, shards=kept, dropped=tuple(sorted({*manifest.dropped, *lost}))))
    finally:
        os.close(held)
    return damaged
