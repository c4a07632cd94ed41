"""Last-token activations of probing texts, computed once and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens import lm
from glp_lens.artifacts import read_tensors, write_tensors
from glp_lens.errors import InputError
from glp_lens.evals.probing.tasks import Task
from glp_lens.types import Acts, Json


@dataclass(frozen=True)
class TaskActivations:
    """Activations of several tasks at one hook point.

    Attributes:
        rows: for each task name `(n, d_in)` float32 on the CPU, in the order of the task's texts.
        source: `model` (see `lm.describe`), `weights` (their hash), `hook`, `context`, and `tokens` by task.
    """

    rows: dict[str, Tensor]
    source: Json


def collect(
    model: lm.Model,
    tasks: Sequence[Task],
    hook: str,
    *,
    context: int = 128,
    batch_tokens: int = 4096,
    cache: str | Path | None = None,
) -> TaskActivations:
    """`task_activations` of each task, with one progress bar over all tokens."""
    lm.check_hook(model, hook)
    ids = {task.name: _ids(model, task, context) for task in tasks}
    tokens = {name: sum(map(len, rows)) for name, rows in ids.items()}
    rows, weights = {}, lm.weights_hash(model)
    total = sum(tokens.values())
    with tqdm(total=total, desc="probing texts", unit="tok", unit_scale=True, mininterval=2) as bar:
        for task in tasks:
            rows[task.name] = task_activations(
                model,
                task,
                hook,
                context=context,
                batch_tokens=batch_tokens,
                cache=cache,
                progress=bar,
                weights=weights,
            )
    source = {"model": lm.describe(model), "weights": weights, "hook": hook, "context": context, "tokens": tokens}
    return TaskActivations(rows, source)


def task_activations(
    model: lm.Model,
    task: Task,
    hook: str,
    *,
    context: int = 128,
    batch_tokens: int = 4096,
    cache: str | Path | None = None,
    progress: tqdm | None = None,
    weights: str | None = None,
) -> Acts:
    """Activation `(n, d_in)` float32 at the last token of each text of the task.

    Each text gets one BOS, so that a text of one token does not land on the attention sink at position 0,
    and loses its beginning if it is longer than the context.

    Args:
        model: a HookedTransformer or TransformerBridge.
        task: whose texts to run.
        hook: a hook point that gives `(batch, pos, d)`.
        context: most tokens of a text, with BOS.
        batch_tokens: most tokens of a batch, with padding.
        cache: a folder where the result is kept. It is used again for the same texts, model, weights, hook
            point and context.
        progress: a bar to advance by the number of tokens done.
        weights: `lm.weights_hash(model)`, if it is known already: it takes a pass over the weights.

    Raises:
        InputError: unknown hook point, one of another shape, or activations that are not finite.
    """
    lm.check_hook(model, hook)
    ids = _ids(model, task, context)
    total = sum(map(len, ids))
    file = None
    if cache is not None:
        file = Path(cache) / f"{task.name}-{_fingerprint(model, weights, task, hook, context)}.safetensors"
        found = _cached(file, len(ids))
        if found is not None:
            if progress is not None:
                # A finished task must not count towards the rate.
                progress.total = (progress.total or 0) - total
            return found
    rows: Tensor | None = None
    for batch in _batches(ids, batch_tokens):
        tokens, mask = lm.pad([ids[i] for i in batch])
        stream = lm.activations(model, tokens, mask, [hook])[hook]
        if stream.ndim != 3:
            raise InputError(
                f"hook point {hook!r} gives shape {tuple(stream.shape)}, expected (batch, pos, d): "
                "use a residual stream or another hook point without a head axis"
            )
        last = stream[torch.arange(len(batch)), mask.sum(1).to(stream.device) - 1].float().cpu()
        if not torch.isfinite(last).all():
            raise InputError(f"activations of task {task.name!r} at {hook!r} are not finite: open the model in float32")
        if rows is None:
            rows = torch.empty(len(ids), last.shape[1])
        rows[batch] = last
        if progress is not None:
            progress.update(int(mask.sum()))
    if rows is None:
        raise InputError(f"task {task.name!r} has no texts")
    if file is not None:
        write_tensors(file, {"rows": rows})
    return rows


def _ids(model: lm.Model, task: Task, context: int) -> list[list[int]]:
    if context < 2:
        raise InputError(f"context must hold BOS and one token at least, got {context}")
    return lm.to_ids(model, task.texts, context, truncate="left")


def _batches(ids: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers of batches of similar length, at least one row each."""
    batch: list[int] = []
    for i in sorted(range(len(ids)), key=lambda i: len(ids[i])):
        if batch and (len(batch) + 1) * len(ids[i]) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _cached(file: Path, n: int) -> Tensor | None:
    try:
        rows = read_tensors(file).get("rows")
    except InputError:  # absent or damaged: computed anew
        return None
    return rows if rows is not None and len(rows) == n else None


def _fingerprint(model: lm.Model, weights: str | None, task: Task, hook: str, context: int) -> str:
    """Hash of all that the activations depend on."""
    facts = [lm.describe(model), weights or lm.weights_hash(model), hook, context, task.texts]
    return xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())
