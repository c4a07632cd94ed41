"""The manifest of an activation store: which shards count, what they hold and where it came from."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import xxhash

from glp_lens.errors import InputError
from glp_lens.files import Kind, read_json
from glp_lens.types import Json

SCHEMA: Final = "glp-lens activations"
VERSION: Final = 2
MANIFEST: Final = "manifest.json"
FILE: Final = Kind("activation store", "copy or collect it again", quiet=True)
"""Earlier versions wrote manifests without a digest, whose shards are checked all the same."""
ROW_ORDER: Final = "document"

STORED: Final[dict[str, np.dtype]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
"""How each dtype lies in the file."""
COLUMNS: Final[dict[str, np.dtype]] = {
    "token_id": np.dtype("<u4"),
    "doc_id": np.dtype("<u8"),
    "position": np.dtype("<u4"),
    "norm": np.dtype("<f4"),
}
"""What is kept about each row; `norm` is the Euclidean norm of the stored row."""
LABELS: Final[dict[str, np.dtype]] = {"int64": np.dtype("<i8"), "float32": np.dtype("<f4")}
"""The dtypes that a caller's own columns can have."""

_LABEL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_RESERVED = {*COLUMNS, "x", "stats", "block_xxh3"}


@dataclass(frozen=True)
class Shard:
    """One shard, as the manifest lists it.

    Attributes:
        index: its place in the store; shard k holds the rows of the k-th run of documents.
        rows: rows it holds.
        bytes: size of the file.
        xxh3_128: hash of the whole file, in hexadecimal.
        head_xxh3: hash of the file's beginning, which holds all that describes the rows; see `shard.head_hash`.
        documents: documents it was made of.
        documents_hash: xxh3-64 over their ids, in order, in hexadecimal.
        excluded: what was left out of it, by reason.
    """

    index: int
    rows: int
    bytes: int
    xxh3_128: str
    head_xxh3: str
    documents: int
    documents_hash: str
    excluded: dict[str, int]

    @property
    def name(self) -> str:
        """The file's name."""
        return shard_name(self.index)


def shard_name(index: int) -> str:
    """The file name of shard `index`."""
    return f"shard-{index:08d}.h5"


@dataclass(frozen=True)
class Manifest:
    """What a store holds and where it came from.

    Attributes:
        dtype: `bfloat16`, `float16` or `float32`.
        source: model, tokenizer, corpus and settings: a continued collection must repeat all of it.
        max_norm: norm above which rows were left out; None if all were kept.
        labels: the caller's own columns and their dtypes, `int64` or `float32`.
        examples: the beginnings of a few texts, to look at.
        command: the options of the command that collected it, to collect dropped shards again.
        part: `(i, n)` if this is the i-th of n parts of a collection, which `merge` joins.
        window: most shards on disk at a time if the store is a stream, whose consumer deletes what it has used; 0 if
            it keeps statistics alone.
        shards: in ascending order of index.
        dropped: indices of shards that were damaged and given up, or that a part still needs.
        complete: whether the collection came to its end.
    """

    hook: str
    d_in: int
    dtype: str
    source: Json
    versions: Json
    max_norm: float | None = None
    labels: Mapping[str, str] = ()  # type: ignore[assignment]
    examples: Sequence[str] = ()
    command: Json | None = None
    part: tuple[int, int] | None = None
    window: int | None = None
    shards: tuple[Shard, ...] = ()
    dropped: tuple[int, ...] = ()
    complete: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", dict(self.labels))

    @property
    def files(self) -> list[Shard]:
        """The shards that have rows, and so a file."""
        return [shard for shard in self.shards if shard.rows]

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents that all shards were made of."""
        return sum(shard.documents for shard in self.shards)

    @property
    def excluded(self) -> dict[str, int]:
        """What was left out, by reason."""
        total: Counter[str] = Counter()
        for shard in self.shards:
            total.update(shard.excluded)
        return dict(total)

    @property
    def corpus_hash(self) -> str:
        """Hash of the documents, in order."""
        return xxhash.xxh3_64_hexdigest("".join(shard.documents_hash for shard in self.shards).encode())

    @property
    def hook_names(self) -> list[str]:
        """All names of the hook point in the language model, those that are known."""
        return list((self.source.get("hook_names") or {}).get(self.hook) or [self.hook])

    @property
    def language_model(self) -> Json:
        """What stores of every version record of the language model: all but the name of its list of blocks."""
        return {key: value for key, value in (self.source.get("model") or {}).items() if key != "blocks"}

    @property
    def identity(self) -> str:
        """Hash of everything that the shards of this store, and of no other, have in common."""
        # Names follow from the language model, and earlier versions did not write them down.
        source = {key: value for key, value in self.source.items() if key != "hook_names"}
        if "model" in source:
            source["model"] = self.language_model
        shared = [self.hook, self.d_in, self.dtype, source, self.max_norm, dict(self.labels)]
        return xxhash.xxh3_64_hexdigest(json.dumps(shared, sort_keys=True).encode())

    @property
    def columns(self) -> dict[str, np.dtype]:
        """Names and dtypes of all columns, the caller's included."""
        return COLUMNS | {name: LABELS[dtype] for name, dtype in self.labels.items()}

    def provenance(self) -> Json:
        """Model, hook point, corpus and number of rows."""
        return {
            "model": self.source.get("model", {}),
            "weights": self.source.get("weights"),
            "tokenizer": self.source.get("tokenizer"),
            "hook": self.hook,
            "hook_names": self.hook_names,
            "d_in": self.d_in,
            "rows": self.rows,
            "dtype": self.dtype,
            "context": self.source.get("settings", {}).get("context"),
            "corpus": {**self.source.get("corpus", {}), "documents": self.documents, "hash": self.corpus_hash},
            "excluded": self.excluded,
            "max_norm": self.max_norm,
        }

    def to_json(self) -> Json:
        """The content of `manifest.json`."""
        return {"schema": SCHEMA, "version": VERSION, "row_order": ROW_ORDER, "rows": self.rows, **asdict(self)}

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the manifest of a store.

        Raises:
            InputError: missing, damaged, or not a manifest of this schema and version.
        """
        value = read_json(folder / MANIFEST, FILE)
        if value.get("schema") != SCHEMA:
            raise InputError(f"{folder / MANIFEST} is not the manifest of an activation store")
        if value.get("version") != VERSION:
            raise InputError(
                f"activation store {folder} has format version {value.get('version')!r}, expected {VERSION}: "
                "open it with the glp-lens release that wrote it, or collect it again"
            )
        try:
            fields = {name: value[name] for name in cls.__dataclass_fields__}
            fields["shards"] = tuple(Shard(**shard) for shard in value["shards"])
            fields["dropped"] = tuple(value["dropped"])
            fields["part"] = tuple(value["part"]) if value["part"] is not None else None
            manifest = cls(**fields)
            valid = manifest._valid() and manifest.rows == value["rows"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"activation store {folder} has a damaged manifest ({error})") from None
        if not valid:
            raise InputError(f"activation store {folder} has a damaged manifest (its values do not fit together)")
        return manifest

    def _valid(self) -> bool:
        sizes = [v for s in self.shards for v in (s.rows, s.bytes, s.documents)]
        indices = [*self.dropped, *(shard.index for shard in self.shards)]
        return (
            self.dtype in STORED
            and type(self.d_in) is int
            and self.d_in > 0
            and all(type(v) is int and v >= 0 for v in sizes)
            and all(type(i) is int and 0 <= i < 10**8 for i in indices)
            and len(set(indices)) == len(indices)
            and all(
                isinstance(text, str)
                for s in self.shards
                for text in (s.xxh3_128, s.head_xxh3, s.documents_hash, *s.excluded)
            )
            and all(type(n) is int for s in self.shards for n in s.excluded.values())
            and all(isinstance(text, str) for text in self.examples)
            and (self.window is None or (type(self.window) is int and self.window >= 0))
            and all(a.index < b.index for a, b in zip(self.shards, self.shards[1:], strict=False))
            and all(dtype in LABELS and label_name(name) for name, dtype in self.labels.items())
        )


class Manifested:
    """Properties of the rows that stores and streams read from the manifest."""

    manifest: Manifest

    @property
    def hook(self) -> str:
        """The hook point the rows came from."""
        return self.manifest.hook

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.manifest.d_in

    @property
    def dtype(self) -> str:
        """Name of the dtype the rows are kept in."""
        return self.manifest.dtype


def label_name(name: str) -> bool:
    """Whether a caller's column may have this name."""
    return bool(_LABEL_NAME.fullmatch(name)) and name not in _RESERVED


def documents_hash(ids: Sequence[int] | np.ndarray) -> str:
    """xxh3-64 over document ids, in order, in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(np.asarray(ids, dtype="<u8").tobytes())
