"""Reconstruction error and delta LM loss (Luo et al., 2026, section 3 and table 2), on the same rows."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, takewhile
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens import hooks, lm, provenance
from glp_lens.activations.forward import pack
from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.evals.cache import ResultCache
from glp_lens.evals.entries import Entry, usable
from glp_lens.evals.fidelity.matching import match, matched_difference
from glp_lens.evals.fidelity.settings import FidelitySettings
from glp_lens.evals.results import Results, Setting
from glp_lens.evals.statistics import bootstrap_mean, bootstrap_ratio
from glp_lens.flow.plan import plan
from glp_lens.interface import Reconstructor, VelocityField

TASK = "heldout"
CLEAN, MEAN, ZERO, NOISE = "clean", "mean ablation", "zero ablation", "noise"
"""Conditions without a model; of `noise` one for each level, `noise sigma=0.1`."""
_FVU = ("fvu", "fvu_standardised")
_PLAN = ("u", "sigma", "steps", "solver", "grid", "fast")
"""Options of a flow's reconstruction that say how often it asks the network."""


class _Text(Protocol):
    @property
    def text(self) -> str: ...


@dataclass(frozen=True, eq=False)
class FidelityData:
    """What fidelity is measured on.

    Attributes:
        model: a HookedTransformer or TransformerBridge.
        hook: the hook point, that of the training store.
        documents: held-out texts, or objects with a `text`; all are used.
        mean: `(d_in,)` mean of the training store: the value of the mean ablation and the reference of FVU.
        std: `(d_in,)` standard deviation of the training store, for `fvu_standardised`; dimensions where it is 0
            do not count there. None measures none.
        batch_size: full-length documents in one forward pass, and of shorter ones as many as have no more tokens; it
            decides memory and speed, no number.
    """

    model: lm.Model
    hook: str
    documents: Sequence[str | _Text]
    mean: Tensor
    std: Tensor | None = None
    batch_size: int = 8


@dataclass(frozen=True)
class _Condition:
    """What activations are replaced by.

    Attributes:
        label, setting: of its metrics.
        replace: new rows for rows `(r, d_in)` and their noise.
        curve: what the conditions of one model at several settings share.
    """

    label: str
    setting: Setting
    replace: Callable[[Tensor, Tensor], Tensor]
    curve: object


@dataclass(frozen=True)
class _Batch:
    """One batch of documents with its clean activations and the noise that all models share.

    Attributes:
        tokens, mask: `(batch, pos)`.
        stream: `(batch, pos, d_in)` float32 activations.
        owners: `(batch, pos)` index of the document.
        inner: `(batch, pos)`, positions whose next token is predicted from a replaced activation.
        usual: `(batch, pos)`, activations that get replaced.
        noise: `(r, d_in)`, of the replaced ones.
        log_p: `(t, d_vocab)` float32, log-probabilities of the untouched model at the inner positions.
        likeliest: `(t,)`, the likeliest token there.
        nll: `(t,)` clean loss there.
        massive: number of activations left alone for their norm.
    """

    tokens: Tensor
    mask: Tensor
    stream: Tensor
    owners: np.ndarray
    inner: Tensor
    usual: Tensor
    noise: Tensor
    log_p: Tensor
    likeliest: Tensor
    nll: np.ndarray
    massive: int

    @property
    def targets(self) -> Tensor:
        """`(t,)`, the tokens after the inner positions."""
        return self.tokens[:, 1:][self.inner[:, :-1]]

    def rows(self) -> Tensor:
        """`(r, d_in)` float32: the activations that get replaced."""
        return self.stream[self.usual]


@checked
def run(
    entries: Sequence[Entry],
    data: FidelityData,
    settings: FidelitySettings | None = None,
    *,
    folder: str | Path | None = None,
    allow_mismatch: bool = False,
) -> Results:
    """Replace activations by their reconstructions and measure what the language model loses.

    Activations at all positions but BOS are replaced. Rows above the models' `max_norm` (massive activations,
    left out of training) pass unchanged and are counted. The loss is token-weighted over the predictions made
    from replaced positions; intervals resample whole documents. Noise is drawn by document, whatever the batch size,
    and shared by all models.

    Args:
        entries: models under different labels, each with its options, for example `{"sigma": 0.3}`; those
            that do not reconstruct are passed over.
        data: the language model, the documents, and the statistics of the training store.
        settings: by default `FidelitySettings()`.
        folder: where the results are kept: a run with equal inputs reads them.
        allow_mismatch: use models trained at another hook point, or on another language model or weight
            processing; each is noted in `failures`.

    Beside the models stand mean and zero ablation, and with `std` the noise that a projection begins with and no model:
    `(1 - sigma) z + sigma eps` in standardised dimensions, at the levels of the settings. What reconstructs no better
    than that at equal FVU has learnt nothing that the language model needs.

    Returns:
        Metrics of task `heldout`: `nll` (nats a token; also of model `clean`), `delta_nll`, `kl` (of the next-token
        distribution from the clean one, nats), `top1` (share of equal likeliest tokens), `fvu`, `fvu_standardised`
        (with `std`: squared errors divided by each dimension's variance), `loss_recovered` (1 is clean, 0 is mean
        ablation) and `loss_recovered_zero` (0 is zero ablation), `network_calls`, `delta_nll_diff:<other>` (paired,
        each at its own FVU) and `delta_nll_matched_diff:<other>` (paired, read off at the other's FVU).

    Raises:
        InputError: labels that repeat, models trained on another hook point, width, language model or weight
            processing, a `std` of another shape than `mean`, or no text long enough to predict a token.
    """
    settings = settings or FidelitySettings()
    notes = provenance.check_edit(data.model, data.hook, allow_mismatch=allow_mismatch)
    here = provenance.here(data.model, data.hook)
    entries, accepted = usable(
        entries, Reconstructor, lambda _: here, reserved=(CLEAN, MEAN, ZERO, NOISE), allow_mismatch=allow_mismatch
    )
    for entry in entries:
        if data.mean.shape != (entry.model.d_in,):
            raise InputError(
                f"{entry.label} was trained on width {entry.model.d_in}, the store's mean has shape "
                f"{tuple(data.mean.shape)}: use models and a mean of the same store"
            )
    notes += accepted
    texts = [d if isinstance(d, str) else d.text for d in data.documents]
    return ResultCache(folder).results(
        "fidelity",
        lambda: [settings.to_json(), here, texts, data.mean, data.std, notes, [entry.identity() for entry in entries]],
        lambda: _run(entries, data, settings, texts, notes),
    )


def _run(
    entries: Sequence[Entry], data: FidelityData, settings: FidelitySettings, texts: list[str], notes: list[str]
) -> Results:
    started = time.perf_counter()
    model, mean = data.model, data.mean.float().cpu()
    scales = _scales(data.mean, data.std)
    ids = [row for row in lm.to_ids(model, texts, settings.context) if len(row) > 2]
    if not ids:
        raise InputError("no document has two tokens or more: nothing to predict, pass longer texts")
    conditions = _conditions(entries, mean, data.std, settings.noise_levels)
    limits = [e.model.max_norm for e in entries if e.model.max_norm is not None]
    limit = min(limits) if limits else None
    parts = []
    total = sum(map(len, ids)) * (len(conditions) + 1)
    with tqdm(total=total, desc="fidelity", unit="tok", unit_scale=True, mininterval=2) as bar:
        for chosen in pack([len(row) for row in ids], data.batch_size * settings.context):
            batch = _clean_pass(data, ids, chosen, limit=limit, seed=settings.seed)
            tokens = int(batch.mask.sum())
            bar.update(tokens)
            rows, lost, error = batch.rows(), {}, {}
            for condition in conditions:
                new = condition.replace(rows, batch.noise)
                error[condition.label] = ((rows - new).double().square() @ scales).numpy()
                lost[condition.label] = _replaced(model, batch, new, data.hook)
                bar.update(tokens)
            spread = ((rows - mean).double().square() @ scales).numpy()
            owners = batch.owners[batch.inner.numpy()], batch.owners[batch.usual.numpy()]
            parts.append(_Measured(batch.massive, batch.nll, spread, *owners, lost, error))

    measured = _Measured.join(parts)
    results = Results("fidelity", failures=list(notes))
    results.config = {
        "hook": data.hook, "context": settings.context, "documents": len(ids), "seed": settings.seed
    }  # fmt: skip
    results.data = {
        "model": lm.describe(model),
        "tokens": len(measured.clean),
        "massive_rows_unchanged": measured.massive,
        "max_norm": limit,
        "documents_hash": hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16],
    }
    _add_metrics(results, measured, conditions)
    for entry in entries:
        calls = _network_calls(entry)
        if calls is not None:
            results.add(entry.label, TASK, entry.setting, "network_calls", calls)
    _add_differences(results, measured, conditions)
    results.extras["curves"] = _curves(conditions)
    results.seconds = time.perf_counter() - started
    return results


@dataclass(frozen=True)
class _Measured:
    """What was measured, by token `(t,)`, by row `(r,)` or `(r, scales)`, and by label.

    Attributes:
        massive: number of rows that passed unchanged for their norm.
        clean: loss of each token of the untouched model.
        spread: squared distance of each row from the mean, `(r, scales)`.
        token_owners, row_owners: index of the document.
        lost: `(t, 3)` by label: loss of each token, KL divergence from the clean distribution, equal likeliest token.
        error: squared error of each row, `(r, scales)`, by label.
    """

    massive: int
    clean: np.ndarray
    spread: np.ndarray
    token_owners: np.ndarray
    row_owners: np.ndarray
    lost: dict[str, np.ndarray]
    error: dict[str, np.ndarray]

    @classmethod
    def join(cls, parts: Sequence[_Measured]) -> _Measured:
        """All batches, in the order of the documents."""
        labels = parts[0].lost
        token_owners = np.concatenate([part.token_owners for part in parts])
        row_owners = np.concatenate([part.row_owners for part in parts])
        by_token, by_row = (np.argsort(owners, kind="stable") for owners in (token_owners, row_owners))
        return cls(
            sum(part.massive for part in parts),
            np.concatenate([part.clean for part in parts])[by_token],
            np.concatenate([part.spread for part in parts])[by_row],
            token_owners[by_token],
            row_owners[by_row],
            {label: np.concatenate([part.lost[label] for part in parts])[by_token] for label in labels},
            {label: np.concatenate([part.error[label] for part in parts])[by_row] for label in labels},
        )

    def delta(self, label: str) -> np.ndarray:
        """`(t,)`, by how much the loss of each token rises."""
        rise: np.ndarray = self.lost[label][:, 0] - self.clean
        return rise

    def fvu(self, label: str) -> float:
        spread = self.spread[:, 0].sum()
        return float(self.error[label][:, 0].sum() / spread) if spread else float("nan")


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
    data: FidelityData, ids: list[list[int]], chosen: list[int], *, limit: float | None, seed: int
) -> _Batch:
    """The pass of the untouched model over the chosen documents."""
    tokens, mask = lm.pad([ids[i] for i in chosen])
    seen: list[Tensor] = []
    inner = mask[:, 1:].clone()
    inner[:, 0] = False
    logits = lm.next_logits(
        data.model, tokens, mask, [(data.hook, lm.keeping(data.hook, mask.shape, seen))], wanted=inner
    )
    stream, width = seen[0], len(data.mean)
    if stream.shape[2] != width:
        raise InputError(
            f"hook point {data.hook} has width {stream.shape[2]}, the mean {width}: "
            "use the hook point that the mean is of"
        )
    usual = mask.clone()
    usual[:, 0] = False
    if limit is not None:
        usual &= stream.norm(dim=2) <= limit
    noise = torch.zeros_like(stream)
    for row, document in enumerate(chosen):
        length = len(ids[document])
        generator = torch.Generator().manual_seed(_document_seed(seed, document))
        noise[row, :length] = torch.randn(length, stream.shape[2], generator=generator, dtype=torch.float32)
    owners = np.broadcast_to(np.array(chosen)[:, None], tuple(mask.shape))
    massive = int((mask[:, 1:] & ~usual[:, 1:]).sum())
    clean = lm.nll(logits, tokens[:, 1:][inner]).double().numpy()
    log_p, likeliest = lm.log_probabilities(logits), logits.max(1).indices
    return _Batch(tokens, mask, stream, owners, _widen(inner), usual, noise[usual], log_p, likeliest, clean, massive)


def _widen(inner: Tensor) -> Tensor:
    """`(batch, pos - 1)` to `(batch, pos)`: the last position predicts nothing."""
    return torch.cat([inner, torch.zeros(len(inner), 1, dtype=torch.bool)], dim=1)


def _document_seed(seed: int, document: int) -> int:
    return int(np.random.SeedSequence([seed, document]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _conditions(
    entries: Sequence[Entry], mean: Tensor, std: Tensor | None, noise_levels: Sequence[float]
) -> list[_Condition]:
    """What activations are replaced by: each model's reconstruction, noise alone, the mean, zero."""
    conditions = [_Condition(e.label, e.setting, partial(_reconstruct, e), id(e.model)) for e in entries]
    if std is not None:
        scale = std.float().cpu()

        def noised(sigma: float, rows: Tensor, noise: Tensor) -> Tensor:
            return mean + (1 - sigma) * (rows - mean) + sigma * scale * noise

        for sigma in noise_levels:
            setting = Setting(sigma=f"{sigma:g}")
            conditions.append(_Condition(f"{NOISE} sigma={sigma:g}", setting, partial(noised, sigma), NOISE))
    return [
        *conditions,
        _Condition(MEAN, Setting(), lambda rows, _: mean.expand_as(rows), MEAN),
        _Condition(ZERO, Setting(), lambda rows, _: torch.zeros_like(rows), ZERO),
    ]


def _reconstruct(entry: Entry, rows: Tensor, noise: Tensor) -> Tensor:
    reconstructor = cast(Reconstructor, entry.model)
    return reconstructor.reconstruct(rows, noise=noise, **entry.options).detach().float().cpu()


def _replaced(model: lm.Model, batch: _Batch, rows: Tensor, hook: str) -> np.ndarray:
    """`(t, 3)` as in `_Measured.lost`, with these rows in the place of the batch's."""
    values = batch.stream.clone()
    values[batch.usual] = rows
    edit = hooks.replace(values, batch.usual, allow_mismatch=True)
    wanted = batch.inner[:, :-1]
    logits = lm.next_logits(model, batch.tokens, batch.mask, [(hook, edit)], wanted=wanted, known=(hook, values))
    nll, kl = lm.divergence(batch.log_p, logits, batch.targets)
    top1 = (logits.max(1).indices == batch.likeliest).cpu()  # the first of equal ones as `argmax`, which is slower
    return torch.stack([nll.double(), kl.double(), top1.double()], dim=1).numpy()


def _add_metrics(results: Results, measured: _Measured, conditions: Sequence[_Condition]) -> None:
    owners = measured.token_owners
    results.add(CLEAN, TASK, "", "nll", **bootstrap_mean(measured.clean, owners)._asdict())
    for condition in conditions:
        label, setting, delta = condition.label, condition.setting, measured.delta(condition.label)
        nll, kl, top1 = measured.lost[label].T
        means = {"nll": nll, "delta_nll": delta, "kl": kl, "top1": top1}
        for name, values in means.items():
            results.add(label, TASK, setting, name, **bootstrap_mean(values, owners)._asdict())
        for name, error, spread in zip(_FVU, measured.error[label].T, measured.spread.T, strict=False):
            fvu = bootstrap_ratio(error, spread, measured.row_owners)
            results.add(label, TASK, setting, name, **fvu._asdict())
        for name, ablation in (("loss_recovered", MEAN), ("loss_recovered_zero", ZERO)):
            floor = measured.delta(ablation)
            results.add(label, TASK, setting, name, **bootstrap_ratio(floor - delta, floor, owners)._asdict())


def _add_differences(results: Results, measured: _Measured, conditions: Sequence[_Condition]) -> None:
    """Paired differences, each at its own distortion, then at the other's; between noise levels alone none."""
    owners = measured.token_owners
    compared = [c for c in conditions if c.label not in (MEAN, ZERO)]
    for first, second in combinations(compared, 2):
        if first.curve == NOISE:
            continue
        gap = bootstrap_mean(measured.lost[first.label][:, 0] - measured.lost[second.label][:, 0], owners)
        results.add(first.label, TASK, first.setting, "delta_nll_diff", **gap._asdict(), other=second.label)
    for curve, labels in _curves(compared).items():
        fvu = {label: measured.fvu(label) for label in labels}
        for other in (c for c in compared if c.label not in labels):
            point = match(fvu, measured.fvu(other.label))
            if point is None:
                continue
            low, high, its = (measured.delta(label) for label in (point.low, point.high, other.label))
            gap = matched_difference(low, high, its, owners, point.weight)
            setting = Setting(fvu=f"{measured.fvu(other.label):.4f}", between=f"{point.low},{point.high}")
            results.add(curve, TASK, setting, "delta_nll_matched_diff", **gap._asdict(), other=other.label)


def _curves(conditions: Sequence[_Condition]) -> dict[str, list[str]]:
    """Labels of one model at several settings, by the name they share."""
    groups: dict[object, list[str]] = {}
    for condition in conditions:
        groups.setdefault(condition.curve, []).append(condition.label)
    curves: dict[str, list[str]] = {}
    for labels in groups.values():
        if len(labels) < 2:
            continue
        columns = zip(*(label.split() for label in labels), strict=False)
        shared = takewhile(lambda words: len(set(words)) == 1, columns)
        name = " ".join(words[0] for words in shared) or labels[0].split()[0]
        curves[name if name not in curves else f"{name} ({labels[0]})"] = labels
    return curves


def _network_calls(entry: Entry) -> int | None:
    """Network evaluations of one reconstruction by a flow; a Gaussian's is known in closed form."""
    if not isinstance(entry.model, VelocityField) or entry.model.kind == "gaussian":
        return None
    return plan(**{name: value for name, value in entry.options.items() if name in _PLAN}).network_calls
