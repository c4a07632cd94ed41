"""Collecting: the activations of a language model on texts, into a store."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from glp_lens.arguments import checked
from glp_lens.defaults import DEFAULT_DTYPE, Dtype
from glp_lens.errors import InputError, counted
from glp_lens.kinds import massive_rule
from glp_lens.pipeline.inputs import ColumnSettings, ContextSettings, LanguageModelSettings, RunSettings
from glp_lens.settings import option

if TYPE_CHECKING:
    from glp_lens import lm
    from glp_lens.activations import ActivationStore
    from glp_lens.corpus import Document
    from glp_lens.types import Json

STDIN = "-"


def parse_keep(kept: str | int) -> int | str:
    """`all`, `last`, `mean`, `max`, or a number of tokens."""
    return int(kept) if str(kept).isdecimal() else str(kept)


def parse_shard(part: str | tuple[int, int]) -> tuple[int, int] | None:
    """Which part of how many, of `i/N` or of the two numbers; an empty text is none."""
    i, slash, n = part.partition("/") if isinstance(part, str) else (str(part[0]), "/", str(part[1]))
    if part == "":
        return None
    if not (slash and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise InputError(f"--shard must be i/N with i from 0 to N-1, for example 0/16, got {part!r}")
    return int(i), int(n)


@dataclass(frozen=True, kw_only=True)
class CollectJob(LanguageModelSettings, ContextSettings, ColumnSettings, RunSettings):
    """Settings of `collect`."""

    essentials = ("model", "hook", "texts", "split", "tokens", "context", "keep", "generate", "chat", "device", "out")

    panel = "Data"
    acts_with: ClassVar[Mapping[str, str]] = {"temperature": "generate"}

    out: Path = option(Path("acts"), panel="Run")
    """Folder for the store; of several hook points, for one store each."""
    hook: tuple[str, ...] = option((), panel="Language model")  # type: ignore[assignment]
    """Hook points, separated by commas; by default the residual stream after the middle layer."""
    batch_size: int = option(32, min=1, panel="Language model", memory=True)
    """Full-length texts in one forward pass."""
    labels: tuple[str, ...] = ()
    """Columns of numbers to keep with every row, separated by commas."""
    split: Literal["train", "heldout", "all"] = "train"
    """Part of the texts: 'heldout' is a twentieth, chosen by hash."""
    documents: int | None = option(None, min=1)
    """Most documents to read."""
    dedup: bool = True
    """Leave out repeated texts."""
    stream_texts: bool = False
    """Read files bit by bit, for texts larger than memory."""
    tokens: int = option(150_000, min=0)
    """Activations to keep; 0 keeps all."""
    dtype: Dtype = DEFAULT_DTYPE
    """Number format on disk."""
    keep: int | str = option("all", panel="Which tokens", parse=parse_keep)
    """Of each text: 'all' tokens, the 'last', their 'mean' or 'max', or a number of them at random."""
    exclude: tuple[str, ...] = option((), panel="Which tokens")
    """Tokens to leave out, separated by commas; 'special' names all special ones."""
    massive: float | str | None = option("gap", panel="Which tokens", parse=massive_rule)
    """Leave out norms beyond the gap in the data ('gap'), or over this many times the median; 0 keeps all."""
    chat: bool = option(False, panel="Which tokens")
    """Put the texts into the model's chat template."""
    generate: int = option(0, min=0, panel="Which tokens")
    """Continue each text by this many tokens, and collect those instead."""
    temperature: float = option(1.0, min=0, panel="Which tokens")
    """Of --generate; 0 is greedy."""
    shard: tuple[int, int] | None = option(None, panel="Scale", parse=parse_shard)
    """i/N, from 0: do the i-th of N parts of the work; 'glp-lens store merge' joins them."""
    ray: int = option(0, min=0, panel="Scale")
    """Spread the work over this many Ray actors."""
    window: int | None = option(None, min=2, panel="Scale")
    """Keep at most this many shards on disk: 'train' uses them meanwhile and deletes them."""

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        super().__post_init__()
        if self.ray and (self.shard or self.window is not None):
            raise InputError("--ray splits the work itself: pass it without --shard and --window")
        if STDIN in self.texts and (self.ray or self.shard):
            raise InputError("standard input can be read only once: pass files to --shard or --ray")

    def command(self) -> Json:
        """The arguments of all calls of a collection, which its manifest keeps so that it can be repeated."""
        return {
            "model": {"name": self.model, "device": self.device, "dtype": self.lm_dtype, "backend": self.backend},
            "texts": {
                "spec": list(self.texts),
                "split": self.split,
                "seed": self.seed,
                "context": None if self.chat or self.generate else self.context,
                "text_column": self.text_column,
                "labels": list(self.labels),
                "dedup": self.dedup,
                "max_documents": self.documents,
                "stream": self.stream_texts,
            },
            "options": {
                "hooks": list(self.hook) or None,
                "max_tokens": self.tokens or None,
                "context": self.context,
                "batch_size": self.batch_size,
                "dtype": self.dtype,
                "keep": self.keep,
                "exclude": list(self.exclude),
                "massive": self.massive,
                "chat": self.chat,
                "seed": self.seed,
                "corpus": f"{','.join(self.texts) or 'sae-probes texts'} ({self.split})",
                "window": self.window,
            },
            "generate": {"tokens": self.generate, "temperature": self.temperature} if self.generate else None,
        }


@checked
def collect(
    settings: CollectJob,
    *,
    model: lm.Model | None = None,
    texts: Sequence[str | Document] | None = None,
    repeatable: bool | None = None,
    say: Callable[[str], None] = print,
) -> list[ActivationStore]:
    """Collect activations into a store, with token, document and position of every row.

    BOS, position 0, padding and massive activations are left out and counted. An interrupted run continues.

    Args:
        model: a HookedTransformer or TransformerBridge to use instead of the one that the settings name.
        texts: texts in memory to use instead of reading those that the settings name.
        repeatable: whether the settings name model and texts, so that the manifest keeps them for `collect_again`; by
            default if neither is passed.
        say: prints a line.

    Returns:
        One store for each hook point.

    Raises:
        InputError: texts, model or hook point that cannot be used, or a folder that holds something else.
    """
    if settings.ray and not (model is None and texts is None):
        raise InputError("ray opens model and texts on each worker: name them in the settings, or collect without ray")
    if texts is not None and (settings.labels or settings.stream_texts or not settings.dedup):
        raise InputError(
            "labels, stream_texts and dedup are of texts that are read, not of those passed: leave them out"
        )
    command = settings.command()
    if texts is not None and not settings.texts:
        command["options"]["corpus"] = f"own texts ({settings.split})"
    if repeatable is None:
        repeatable = model is None and texts is None
    stores = _run(
        command, settings.out, ray=settings.ray, part=settings.shard, model=model, texts=texts, repeatable=repeatable
    )
    for store in stores:
        fewer = settings.shard is None and len(store) < settings.tokens
        short = f" (the texts have no more of the {settings.tokens:,} asked for)" if fewer else ""
        say(f"{counted(len(store), 'row')} of width {store.d_in} from {store.hook}{short}: {store.path}")
    if settings.shard is not None:
        i, n = settings.shard
        say(f"part {i} of {n} is done; once all are: glp-lens store merge {settings.out}")
    return stores


def collect_again(command: Json, out: Path) -> list[ActivationStore]:
    """Repeat a collection from the arguments in its manifest: what is missing in `out` is collected.

    Raises:
        InputError: arguments that are not of this version.
    """
    return _run(command, out)


def _run(
    command: Json,
    out: Path,
    *,
    ray: int = 0,
    part: tuple[int, int] | None = None,
    model: lm.Model | None = None,
    texts: Sequence[str | Document] | None = None,
    repeatable: bool = True,
) -> list[ActivationStore]:
    from glp_lens import corpus, lm
    from glp_lens.activations.collect import Generation
    from glp_lens.activations.collect import collect as run

    try:
        open_model = partial(lm.open_model, **command["model"])
        open_texts = partial(corpus.open_corpus, **command["texts"])
        inspect.signature(lm.open_model).bind(**command["model"])
        inspect.signature(corpus.open_corpus).bind(**command["texts"])
        inspect.signature(run).bind(None, None, **command["options"])
        generate = Generation(**command["generate"]) if command["generate"] else None
        repeatable &= STDIN not in command["texts"]["spec"]  # which is gone once it was read
        options: dict[str, Any] = {
            **command["options"], "generate": generate, "command": command if repeatable else None,
        }  # fmt: skip
    except (KeyError, TypeError) as error:
        raise InputError(f"the recorded command cannot be repeated ({error}): collect again by hand") from None
    if ray:
        from glp_lens.activations.cluster import collect_on_ray

        gpus = int(command["model"]["device"].startswith("cuda"))
        collected = collect_on_ray(open_model, open_texts, out=out, actors=ray, num_gpus=gpus, **options)
    else:
        if texts is None:
            corpus.check_texts(*(command["texts"][name] for name in ("spec", "text_column", "labels")))
        opened = open_model() if model is None else model
        for hook in options["hooks"] or ():
            lm.check_hook(opened, hook)  # a wrong one is refused before texts are read, which takes a while
        about = command["texts"]
        if texts is None:
            documents = open_texts()
        else:
            documents = corpus.split_documents(texts, about["split"], seed=about["seed"])[: about["max_documents"]]
        collected = run(opened, documents, out=out, part=part, **options)
    return list(collected.values()) if isinstance(collected, dict) else [collected]
