"""Reconstruction error and delta LM loss (Luo et al., 2026, section 3 and table 2), on the same rows."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, takewhile
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens import hooks, lm, provenance
from glp_lens.errors import InputError
from glp_lens.evals.entries import Entry
from glp_lens.evals.fidelity.matching import match, matched_difference
from glp_lens.evals.results import Results
from glp_lens.evals.statistics import bootstrap_mean, bootstrap_ratio
from glp_lens.flow.plan import plan
from glp_lens.interface import Reconstructor, VelocityField

TASK = "heldout"
MEAN = "mean ablation"
_FVU = ("fvu", "fvu_standardised")
_PLAN = ("u", "sigma", "steps", "solver", "grid", "fast")
"""Options of a flow's reconstruction that say how often it asks the network."""


class _Text(Protocol):
    @property
    def text(self) -> str: ...


@dataclass
class _Measured:
    """Per replaced token: `nll` of the next token `(t,)`; per reconstructed row: squared `error` `(r, scales)`."""

    nll: list[np.ndarray]
    error: list[np.ndarray]


@dataclass(frozen=True)
class _Batch:
    """One batch of documents with its clean activations and the noise that all models share."""

    tokens: Tensor
    mask: Tensor
    stream: Tensor
    owners: np.ndarray
    inner: Tensor
    usual: Tensor
    noise: Tensor

    def rows(self) -> Tensor:
        """`(r, d_in)` float32: the activations that get replaced."""
        return self.stream[self.usual]


def run(
    model: lm.Model,
    entries: Sequence[Entry],
    documents: Sequence[str | _Text],
    hook: str,
    *,
    mean: Tensor,
    std: Tensor | None = None,
    context: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    allow_mismatch: bool = False,
) -> Results:
    """Replace activations by their reconstructions and measure what the language model loses.

    Activations at all positions but BOS are replaced. Rows above the models' `max_norm` (massive activations,
    left out of training) pass unchanged and are counted. The loss is token-weighted over the predictions made
    from replaced positions; intervals resample whole documents.

    Args:
        model: a HookedTransformer or TransformerBridge.
        entries: models under different labels, each with its options, for example `{"sigma": 0.3}`; those
            that do not reconstruct are passed over.
        documents: held-out texts, or objects with a `text`.
        hook: the hook point, that of the training store.
        mean: `(d_in,)` mean of the training store: the value of the mean ablation and the reference of FVU.
        std: `(d_in,)` standard deviation of the training store, for `fvu_standardised`; dimensions where it is 0
            do not count there.
        context: tokens of each document, BOS included.
        batch_size: documents in one forward pass.
        seed: of the noise, which is drawn by document, whatever the batch size, and shared by all models.
        allow_mismatch: use models trained at another hook point, or on another language model or weight
            processing; each is noted in `failures`.

    Returns:
        Metrics of task `heldout`: `nll` (nats a token; also of model `clean`), `delta_nll`, `fvu`,
        `fvu_standardised` (with `std`: squared errors divided by each dimension's variance),
        `loss_recovered` (1 is clean, 0 is mean ablation), `network_calls`, `delta_nll_diff:<other>` (paired,
        each at its own FVU) and `delta_nll_matched_diff:<other>` (paired, read off at the other's FVU).

    Raises:
        InputError: labels that repeat, models trained on another hook point, width, language model or weight
            processing, a `std` of another shape than `mean`, or no text long enough to predict a token.
    """
    started = time.perf_counter()
    entries = [e for e in entries if isinstance(e.model, Reconstructor)]
    accepted = _check(model, entries, hook, mean, allow_mismatch=allow_mismatch)
    scales = _scales(mean, std)
    texts = [d if isinstance(d, str) else d.text for d in documents]
    ids = [row for row in lm.to_ids(model, texts, context) if len(row) > 2]
    if not ids:
        raise InputError("no document has two tokens or more: nothing to predict, pass longer texts")
    limits = [e.model.max_norm for e in entries if e.model.max_norm is not None]
    limit = min(limits) if limits else None

    clean: list[np.ndarray] = []
    spread: list[np.ndarray] = []
    token_owners: list[np.ndarray] = []
    row_owners: list[np.ndarray] = []
    measured = {label: _Measured([], []) for label in [*(e.label for e in entries), MEAN]}
    total = sum(map(len, ids)) * (len(measured) + 1)
    massive = 0
    mean = mean.float().cpu()
    with tqdm(total=total, desc="fidelity", unit="tok", unit_scale=True, mininterval=2) as bar:
        for start in range(0, len(ids), batch_size):
            batch, nll = _clean_pass(
                model, ids[start : start + batch_size], first=start, hook=hook, width=len(mean), limit=limit, seed=seed
            )
            size = int(batch.mask.sum())
            clean.append(nll)
            token_owners.append(batch.owners[batch.inner.numpy()])
            row_owners.append(batch.owners[batch.usual.numpy()])
            rows = batch.rows()
            spread.append(((rows - mean).double().square() @ scales).numpy())
            massive += int((batch.mask[:, 1:] & ~batch.usual[:, 1:]).sum())
            bar.update(size)
            for entry in [*entries, None]:
                new = mean.expand_as(rows) if entry is None else _reconstruct(entry, rows, batch.noise)
                found = measured[MEAN if entry is None else entry.label]
                found.error.append(((rows - new).double().square() @ scales).numpy())
                found.nll.append(_replaced_nll(model, batch, new, hook))
                bar.update(size)

    results = Results("fidelity", failures=accepted)
    results.config = {"hook": hook, "context": context, "documents": len(ids), "seed": seed}
    results.data = {
        "model": lm.describe(model),
        "tokens": int(sum(map(len, clean))),
        "massive_rows_unchanged": massive,
        "max_norm": limit,
        "documents_hash": hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16],
    }
    settings = {e.label: e.setting for e in entries}
    summary = _Summary(
        np.concatenate(clean),
        np.concatenate(spread),
        np.concatenate(token_owners),
        np.concatenate(row_owners),
        {label: np.concatenate(m.nll) for label, m in measured.items()},
        {label: np.concatenate(m.error) for label, m in measured.items()},
    )
    _add_metrics(results, summary, settings)
    for entry in entries:
        calls = _network_calls(entry)
        if calls is not None:
            results.add(entry.label, TASK, entry.setting, "network_calls", calls)
    _add_differences(results, summary, entries)
    results.extras["curves"] = _curves(entries)
    results.seconds = time.perf_counter() - started
    return results


@dataclass(frozen=True)
class _Summary:
    """Everything measured: by token `(t,)`, by row `(r,)` or `(r, scales)`, and by condition."""

    clean: np.ndarray
    spread: np.ndarray
    token_owners: np.ndarray
    row_owners: np.ndarray
    nll: dict[str, np.ndarray]
    error: dict[str, np.ndarray]

    def fvu(self, label: str) -> float:
        spread = self.spread[:, 0].sum()
        return float(self.error[label][:, 0].sum() / spread) if spread else float("nan")


def _check(model: lm.Model, entries: Sequence[Entry], hook: str, mean: Tensor, *, allow_mismatch: bool) -> list[str]:
    """Refuse what cannot be compared; a line for each mismatch that was accepted."""
    notes = provenance.check_edit(model, hook, allow_mismatch=allow_mismatch)
    labels = [e.label for e in entries]
    if len(set(labels)) < len(labels) or MEAN in labels:
        raise InputError(f"labels must differ, and none may be {MEAN!r}; got {', '.join(labels)}")
    for entry in entries:
        if mean.shape != (entry.model.d_in,):
            raise InputError(
                f"{entry.label} was trained on width {entry.model.d_in}, the store's mean has shape "
                f"{tuple(mean.shape)}: use models and a mean of the same store"
            )
    models = {e.label: e.model for e in entries}
    return notes + provenance.check_models(models, provenance.here(model, hook), allow_mismatch=allow_mismatch)


def _scales(mean: Tensor, std: Tensor | None) -> Tensor:
    """`(d_in, scales)` weights of squared errors, one column for each of `_FVU`: 1, then `1 / std^2` if known."""
    ones = torch.ones(len(mean), dtype=torch.float64)
    if std is None:
        return ones[:, None]
    if std.shape != mean.shape:
        raise InputError(
            f"expected a standard deviation of shape {tuple(mean.shape)} like the mean, got {tuple(std.shape)}: "
            "pass both of the training store"
        )
    variance = std.double().cpu().square()
    return torch.stack([ones, torch.where(variance > 0, 1 / variance, 0.0)], dim=1)


def _clean_pass(
    model: lm.Model, ids: list[list[int]], *, first: int, hook: str, width: int, limit: float | None, seed: int
) -> tuple[_Batch, np.ndarray]:
    """The batch with its activations, and the clean NLL of each token predicted from a replaced position."""
    tokens, mask = lm.pad(ids)
    found: list[Tensor] = []

    name = hook

    def grab(tensor: Tensor, *, hook: Any = None) -> Tensor:
        found.append(lm.rows_at(name, tensor, mask.shape).detach().float().cpu())
        return tensor

    nll = lm.token_nll(model, tokens, mask, [(hook, grab)])
    stream = found[0]
    if stream.shape[2] != width:
        raise InputError(
            f"hook point {hook} has width {stream.shape[2]}, the mean {width}: use the hook point that the mean is of"
        )
    usual = mask.clone()
    usual[:, 0] = False
    inner = usual[:, :-1] & mask[:, 1:]
    if limit is not None:
        usual &= stream.norm(dim=2) <= limit
    noise = torch.zeros_like(stream)
    for i, row in enumerate(ids):
        generator = torch.Generator().manual_seed(_document_seed(seed, first + i))
        noise[i, : len(row)] = torch.randn(len(row), stream.shape[2], generator=generator, dtype=torch.float32)
    owners = np.broadcast_to(np.arange(first, first + len(ids))[:, None], tuple(mask.shape))
    batch = _Batch(tokens, mask, stream, owners, _widen(inner), usual, noise[usual])
    return batch, nll[inner].double().numpy()


def _widen(inner: Tensor) -> Tensor:
    """`(batch, pos - 1)` to `(batch, pos)`: the last position predicts nothing."""
    return torch.cat([inner, torch.zeros(len(inner), 1, dtype=torch.bool)], dim=1)


def _document_seed(seed: int, document: int) -> int:
    return int(np.random.SeedSequence([seed, document]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _reconstruct(entry: Entry, rows: Tensor, noise: Tensor) -> Tensor:
    reconstructor = cast(Reconstructor, entry.model)
    return reconstructor.reconstruct(rows, noise=noise, **entry.options).detach().float().cpu()


def _replaced_nll(model: lm.Model, batch: _Batch, rows: Tensor, hook: str) -> np.ndarray:
    values = batch.stream.clone()
    values[batch.usual] = rows
    nll = lm.token_nll(
        model, batch.tokens, batch.mask, [(hook, hooks.replace(values, batch.usual, allow_mismatch=True))]
    )
    return nll[batch.inner[:, :-1]].double().numpy()


def _add_metrics(results: Results, summary: _Summary, settings: dict[str, str]) -> None:
    owners = summary.token_owners
    results.add("clean", TASK, "", "nll", **bootstrap_mean(summary.clean, owners)._asdict())
    floor = summary.nll[MEAN] - summary.clean
    for label, nll in summary.nll.items():
        setting, delta = settings.get(label, ""), nll - summary.clean
        results.add(label, TASK, setting, "nll", **bootstrap_mean(nll, owners)._asdict())
        results.add(label, TASK, setting, "delta_nll", **bootstrap_mean(delta, owners)._asdict())
        for name, error, spread in zip(_FVU, summary.error[label].T, summary.spread.T, strict=False):
            fvu = bootstrap_ratio(error, spread, summary.row_owners)
            results.add(label, TASK, setting, name, **fvu._asdict())
        recovered = bootstrap_ratio(floor - delta, floor, owners)
        results.add(label, TASK, setting, "loss_recovered", **recovered._asdict())


def _add_differences(results: Results, summary: _Summary, entries: Sequence[Entry]) -> None:
    """Paired differences, each at its own distortion, then at the other's."""
    owners = summary.token_owners
    for first, second in combinations(entries, 2):
        gap = bootstrap_mean(summary.nll[first.label] - summary.nll[second.label], owners)
        results.add(first.label, TASK, first.setting, f"delta_nll_diff:{second.label}", **gap._asdict())
    for curve, labels in _curves(entries).items():
        fvu = {label: summary.fvu(label) for label in labels}
        for other in (e for e in entries if e.label not in labels):
            point = match(fvu, summary.fvu(other.label))
            if point is None:
                continue
            low, high, its = (summary.nll[label] - summary.clean for label in (point.low, point.high, other.label))
            gap = matched_difference(low, high, its, owners, point.weight)
            setting = f"fvu={summary.fvu(other.label):.4f};between={point.low},{point.high}"
            name = f"delta_nll_matched_diff:{other.label}"
            results.add(curve, TASK, setting, name, **gap._asdict())


def _curves(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """Labels of one model at several settings, by the name they share."""
    groups: dict[int, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(id(entry.model), []).append(entry)
    curves: dict[str, list[str]] = {}
    for group in groups.values():
        if len(group) < 2:
            continue
        labels = [e.label for e in group]
        columns = zip(*(label.split() for label in labels), strict=False)
        shared = takewhile(lambda words: len(set(words)) == 1, columns)
        name = " ".join(words[0] for words in shared) or group[0].model.kind
        curves[name if name not in curves else f"{name} ({labels[0]})"] = labels
    return curves


def _network_calls(entry: Entry) -> int | None:
    """Network evaluations of one reconstruction by a flow."""
    if not isinstance(entry.model, VelocityField):
        return None
    return plan(**{name: value for name, value in entry.options.items() if name in _PLAN}).network_calls
