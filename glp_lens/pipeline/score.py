"""Scoring: how odd each token of some texts is, by trained models and simple distances."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from glp_lens.arguments import checked
from glp_lens.errors import InputError, or_warning
from glp_lens.evals.detect.settings import OWN, ScoreSettings
from glp_lens.pipeline.inputs import (
    ColumnSettings,
    ContextSettings,
    LanguageModelSettings,
    SuiteJob,
    at_hook,
    hook_point,
    load_models,
    open_language_model,
    open_training_store,
)
from glp_lens.settings import option

if TYPE_CHECKING:
    import pandas as pd

    from glp_lens import lm
    from glp_lens.artifacts import ActivationModel
    from glp_lens.corpus import Document
    from glp_lens.evals.detect.detectors import Detector
    from glp_lens.evals.entries import Entry
    from glp_lens.pipeline.stages import JobInFolder

_ENDLESS = 2**40
"""More tokens than a text has."""
_ODDEST, _BEGINNING = 5, 60
"""Texts that are named as the oddest, and characters of each."""
CONTENT = "content"
"""Column of texts.parquet: the text itself."""
TOKENS, TEXTS, PAGE = "tokens.parquet", "texts.parquet", "tokens.html"


@dataclass(frozen=True, kw_only=True)
class ScoreJob(ScoreSettings, LanguageModelSettings, ContextSettings, ColumnSettings, SuiteJob):
    """Settings of `score`."""

    essentials = ("models", "texts", "normal", "store", "ref", "documents", "model", "device", "out")

    panel = "Data"
    acts_with: ClassVar[Mapping[str, str]] = {"neighbours": "store", "reference_rows": "store"}

    ref: str | None = None
    """Folder or Hub id of the prior that the GLPs were finetuned from: adds the ratio of their errors."""
    normal: tuple[str, ...] = ()
    """Texts known to be normal, named as those of --texts: adds to each text the share of them that is as odd, a p
    value that holds for any score."""
    store: Path | None = None
    """Folder of the activation store that the models were trained on, for the distance to nearest neighbours."""
    documents: int = option(200, min=1, memory=True)
    """Most texts, the first ones."""
    out: Path = option(Path("scores"), panel="Run")
    """Folder for the output."""

    def __post_init__(self) -> None:
        """Check each setting, and that there are models."""
        super().__post_init__()
        if not self.models:
            raise InputError("--models needs at least one folder of a trained model")


@checked
def score(
    settings: ScoreJob,
    *,
    model: lm.Model | None = None,
    texts: Sequence[str | Document] | None = None,
    say: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Score every token of texts: distances, losses, denoising errors; higher is odder.

    Longer texts than the context are read in pieces, each from a BOS of its own.

    Writes to `out`: tokens.parquet (a row a token), texts.parquet (a row a text: its number, its content, means and a
    high quantile), and tokens.html, the texts coloured by score.

    Args:
        model: the language model, where it is open already.
        texts: texts in memory to score instead of those that the settings name.
        say: prints a line.

    Returns:
        The scores of the tokens: `text`, `position`, `token`, `token_id`, and a column for each score.

    Raises:
        InputError: models, texts or a hook point that cannot be used, or scores that are already there.
    """
    in_memory = model is not None or texts is not None
    with settings.at_work("score", TOKENS, TEXTS, PAGE, in_memory=in_memory) as begun:
        return _score(settings, begun, model, texts, say)


def _score(
    settings: ScoreJob,
    begun: JobInFolder,
    model: lm.Model | None,
    texts: Sequence[str | Document] | None,
    say: Callable[[str], None],
) -> pd.DataFrame:
    """`score`, in a folder that is its own."""
    from glp_lens import lm, provenance
    from glp_lens.corpus import Document
    from glp_lens.evals.detect.detectors import nearest
    from glp_lens.evals.detect.job import entries, open_reference
    from glp_lens.evals.detect.measures import conformal_p
    from glp_lens.evals.detect.tokens_page import write_tokens_page

    trained = load_models(settings.models, settings.device)
    if texts is None:
        given = _read(settings.texts, settings)
    else:
        given = [text if isinstance(text, Document) else Document.of(text) for text in texts]
    if not (given := given[: settings.documents]):
        raise InputError("no texts to score: pass --texts")
    usual = _read(settings.normal, settings) if settings.normal else None
    reference = open_reference(settings.ref, settings.device)
    model = model or open_language_model(settings, settings.device)
    point = hook_point(model, settings.hook, trained)
    here = provenance.here(model, point)
    trained = at_hook(trained, point)
    reference = None if reference is None else provenance.bound(reference, point)
    checked = dict(trained) | ({} if reference is None else {"--ref": reference})
    notes = provenance.check_models(checked, here, allow_mismatch=settings.allow_mismatch)
    neighbours = None
    if settings.store is not None:
        store, _, more = open_training_store(settings.store, trained, allow_mismatch=settings.allow_mismatch)
        neighbours = nearest(store.sample(settings.reference_rows, settings.seed), settings.neighbours)
        notes += more
    limits = [each.max_norm for each in trained.values() if each.max_norm is not None]
    limit = min(limits, default=None)
    compared = _able(entries(trained, settings.denoise_sigmas), notes)
    scorer = _Scorer(model, point, compared, settings, reference, neighbours, limit)
    tokens, pooled = scorer([document.text for document in given])
    normal = None
    if usual is not None:
        normal, known = scorer([document.text for document in usual])
        for name in scorer.names:
            pooled[f"{name}_p"] = conformal_p(known[f"{name}_mean"].dropna(), pooled[f"{name}_mean"])
    folder = settings.out
    begun.saving()
    _write(tokens, folder / TOKENS)
    _write(_with_content(pooled, given), folder / TEXTS)
    others = "tokens of normal texts" if settings.normal else "tokens here"
    note = f"{lm.name_of(model)} at {point}; a token's colour is the share of {others} with a lower score."
    show = partial(
        write_tokens_page, tokens, pooled, folder / PAGE, note=note, first=next(iter(trained)),
        title=f"Token scores of {len(pooled)} text{'' if len(pooled) == 1 else 's'}",
        normal=None if normal is None else {name: normal[name].to_numpy() for name in scorer.names},
    )  # fmt: skip
    begun.complete = or_warning(PAGE, show) is not None
    for name in scorer.names:
        say(f"{name:24} mean {tokens[name].mean():.4g}, 99% {tokens[name].quantile(0.99):.4g}")
    _tell_oddest(pooled, scorer.names[0], given, say)
    for line in notes:
        say(f"note: {line}")
    say(f"scores: {folder / PAGE}, {folder / TOKENS} and {folder / TEXTS}")
    return tokens


def _with_content(pooled: pd.DataFrame, given: Sequence[Document]) -> pd.DataFrame:
    """The rows of texts, with their number and what they say."""
    frame = pooled.reset_index()
    frame.insert(1, CONTENT, [given[text].text for text in frame["text"]])
    return frame


def _tell_oddest(pooled: pd.DataFrame, name: str, given: Sequence[Document], say: Callable[[str], None]) -> None:
    if len(pooled) > 1:
        say(f"oddest of {len(pooled)} texts by {name}:")
        for text, score in pooled[f"{name}_mean"].nlargest(_ODDEST).items():
            say(f"  {score:.4g}  text {text}: {' '.join(given[text].text.split())[:_BEGINNING]}")


class _Scorer:
    """Texts in, frames of token scores and of pooled ones out."""

    def __init__(
        self,
        model: lm.Model,
        hook: str,
        entries: Sequence[Entry],
        settings: ScoreJob,
        reference: ActivationModel | None,
        neighbours: Detector | None,
        limit: float | None,
    ) -> None:
        self.model, self.hook, self.entries, self.settings = model, hook, entries, settings
        self.reference, self.neighbours, self.limit = reference, neighbours, limit
        self.names: list[str] = []

    def __call__(self, texts: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
        """A row a token, and a row a text, its index that of the text."""
        import pandas as pd

        from glp_lens import lm
        from glp_lens.evals.detect.detectors import pooled, score_tokens
        from glp_lens.evals.detect.reading import read

        room = self.settings.context - 1
        windows = [
            (i, start, [bos, *row[start : start + room]])
            for i, (bos, *row) in enumerate(lm.to_ids(self.model, texts, _ENDLESS))
            for start in range(0, len(row), room)
        ]
        if not windows:
            raise InputError("no text has a token to score: pass texts that are not empty")
        owners, starts = (np.array(column) for column in list(zip(*windows, strict=True))[:2])
        tokens = read(self.model, self.hook, [ids for *_, ids in windows], limit=self.limit)
        scores = score_tokens(
            tokens, self.entries, self.settings, reference=self.reference, neighbours=self.neighbours,
            seed=self.settings.seed,
        )  # fmt: skip
        self.names = list(scores)
        tokenizer = lm.tokenizer_of(self.model)
        owner = owners[tokens.text]
        about = {
            "text": owner,
            "position": starts[tokens.text] + tokens.position,
            "token": [str(tokenizer.decode([int(token)])) for token in tokens.ids],
            "token_id": tokens.ids,
        }
        frame = pd.DataFrame(about | scores)
        whole = {
            f"{name}_{way}": pooled(values, owner, len(texts), quantile)
            for name, values in scores.items()
            for way, quantile in (("mean", None), ("quantile", self.settings.token_quantile))
        }
        places = pd.DataFrame(whole, index=pd.RangeIndex(len(texts), name="text"))
        return frame, places.loc[np.unique(frame["text"])]


def _able(entries: Sequence[Entry], notes: list[str]) -> list[Entry]:
    """The entries that score activations, with a note of each that does not."""
    from glp_lens.evals.entries import usable
    from glp_lens.interface import Scorer

    able, more = usable(
        entries, Scorer, lambda _: {}, reserved=OWN, left_out="{label}: gives no score of an activation ({kind})"
    )
    notes += more
    return able


def _read(spec: Sequence[str], settings: ScoreJob) -> list[Document]:
    """Texts in the order of their files; by default held-out ones of the packaged corpus."""
    from glp_lens import corpus

    documents = corpus.open_corpus(
        spec, split="all" if spec else "heldout", seed=settings.seed, context=None,
        text_column=settings.text_column, dedup=False, stream=True, shuffle_buffer=0,
    )  # fmt: skip
    return list(islice(documents, settings.documents))


def _write(frame: pd.DataFrame, path: Path) -> None:
    from glp_lens.files import Kind, write_table

    write_table(path, frame, Kind("scores", "run glp-lens score again"))
