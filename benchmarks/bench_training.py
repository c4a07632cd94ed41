"""Training steps in the paper's widths, against the plain way of the same mathematics.

The plain way computes the time path for each row, updates with AdamW as it comes, and, where loading counts, takes
its rows from a DataLoader of one row an item. At small batches, where weights are read more than used, also against
autocast and torch's fused AdamW, which was our way before.
"""

import copy
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_batches import Data, released_loader
from by_row import CEILING, random_denoiser, velocity_by_row
from conftest import OURS, Sized, Timed
from torch import Tensor, nn

from glp_lens.activations import write_store
from glp_lens.models.denoiser import Denoiser
from glp_lens.training import config as recipes
from glp_lens.training import optim
from glp_lens.training.config import RunOptions, TrainConfig
from glp_lens.training.loop import train
from glp_lens.training.objective import Batch, draw_noise

BATCH = 4096
SHAPES = {576: (6, 2), 2048: (1, 1)}
"""Blocks, and steps a round, of each width. Six blocks of the larger one want 14 GB for weights and optimiser."""
PLAIN = "the plain way (released recipe)"
AUTOCAST = "autocast and fused AdamW"
AND_BYTES = "matrix products, and copying the bytes of an update (ceiling)"
ROUNDS = 2
SMALL = (256, 1024)
"""Rows of small batches: that of the recipe `fast`, and one of four times the size."""


def recipe(steps: int, batch: int = BATCH, *, autocast: bool = True) -> TrainConfig:
    return TrainConfig(rows=steps * batch, batch_size=batch, lr=1e-3, autocast=autocast)


@dataclass(frozen=True)
class Case:
    """A denoiser to start from and its rows, on disk and in memory."""

    denoiser: Denoiser
    data: Data
    steps: int

    def batches(self) -> Iterator[Tensor]:
        """Normalised, in stored order."""
        return (self.data.normalise(x) for x in self.data.rows.split(BATCH))


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    d, (blocks, steps) = request.param, SHAPES[request.param]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((steps + 1) * BATCH, d, generator=generator).bfloat16()
    mean, std = torch.zeros(d), torch.ones(d)
    folder: Path = tmp_path_factory.mktemp("rows")
    x.view(torch.int16).numpy().tofile(folder / "rows.bin")
    store = write_store(folder / "acts", x, hook="blocks.14.hook_resid_post", dtype="bfloat16")
    return Case(random_denoiser(d, blocks), Data(x, store, folder / "rows.bin", mean, std), steps)


def our_training(denoiser: Denoiser, batches: Iterator[Tensor], config: TrainConfig) -> float:
    """Mean loss of the steps."""

    def feed(start: int) -> Generator[Batch]:
        yield from map(Batch, islice(batches, start, None))

    trained = train(denoiser, feed, config, run=RunOptions(log_points=1))
    return float(trained.history[0]["loss"])


def plain_training(denoiser: Denoiser, batches: Iterator[Tensor], config: TrainConfig) -> float:
    """Time path for each row and AdamW as it comes; the same draws of noise and learning rates as ours."""
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=config.lr)
    losses = []
    denoiser.train()
    for step, x in zip(range(config.steps), batches, strict=False):
        optimizer.param_groups[0]["lr"] = config.lr_at(step)
        noise = draw_noise(config, step, range(len(x)), x.shape[1], x.device)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.autocast):
            z = (1 - noise.sigma[:, None]) * x + noise.sigma[:, None] * noise.eps
            velocity = velocity_by_row(denoiser, z, noise.sigma)
        loss = nn.functional.mse_loss(velocity.float(), noise.eps - x)
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def our_batches(data: Data) -> Iterator[Tensor]:
    return data.store.batches(BATCH, normalize=(data.mean, data.std))


def plain_batches(data: Data) -> Iterator[Tensor]:
    return released_loader(data, epochs=1)


Training = Callable[[Denoiser, Iterator[Tensor], TrainConfig], float]
TRAININGS: dict[str, tuple[Training, Callable[[Data], Iterator[Tensor]]]] = {
    OURS: (our_training, our_batches),
    PLAIN: (plain_training, plain_batches),
}


def label(work: str, case: Case) -> str:
    shape = case.denoiser.config
    blocks = f"{shape.n_layers} block{'s' * (shape.n_layers > 1)}"
    return f"training, {work}, batches of {BATCH}, d = {shape.d_input}, {blocks}"


@pytest.fixture(scope="module")
def losses() -> dict[int, float]:
    """Loss of the first way timed, by width."""
    return {}


@pytest.mark.parametrize("loading", [False, True], ids=["compute", "loading"])
@pytest.mark.parametrize("way", TRAININGS)
def test_training(way: str, loading: bool, case: Case, losses: dict[int, float], timed: Timed) -> None:
    training, load = TRAININGS[way]
    config = recipe(case.steps)

    def setup() -> tuple[tuple[Denoiser, Iterator[Tensor], TrainConfig], dict[str, Any]]:
        batches = iter(list(case.batches())[: case.steps])
        return (copy.deepcopy(case.denoiser), load(case.data) if loading else batches, config), {}

    work = label("loading included" if loading else "compute alone", case)
    loss = timed(work, way, training, setup=setup, amount=case.steps * BATCH, unit="rows", rounds=ROUNDS)
    # Rows that are loaded come in another order, and are alike.
    assert loss == pytest.approx(losses.setdefault(case.data.rows.shape[1], loss), rel=0.01 if loading else 1e-3)


def training_products(denoiser: Denoiser, rows: dict[str, int]) -> Callable[[], int]:
    """The products of one forward and backward pass in bfloat16: three for each matrix, two where it comes first.

    Operands lie as they are multiplied fastest, and nothing is read or written but for the products.
    """
    weights = {name: m.weight.detach().bfloat16() for name, m in denoiser.named_modules() if isinstance(m, nn.Linear)}
    inputs = {(rows[name], w.shape[1]): torch.randn(rows[name], w.shape[1]).bfloat16() for name, w in weights.items()}
    errors = {(rows[name], w.shape[0]): torch.randn(rows[name], w.shape[0]).bfloat16() for name, w in weights.items()}
    turned = {shape: error.T.contiguous() for shape, error in errors.items()}

    def products() -> int:
        multiplied = 0
        for name, w in weights.items():
            shape = rows[name], w.shape[0]
            x, error = inputs[rows[name], w.shape[1]], errors[shape]
            made = [x @ w.T, turned[shape] @ x]
            if name not in ("in_proj", "time_embed.0"):
                made.append(error @ w)
            multiplied += len(made) * rows[name] * w.numel()
        return multiplied

    return products


def update_bytes(denoiser: Denoiser) -> Callable[[], object]:
    """Reads and writes as many bytes as an update must: weights and two moments in float32, and bfloat16 gradients
    in, copies out.
    """
    size = 3.5 * sum(p.numel() for p in denoiser.parameters())
    before, after = torch.ones(int(size)), torch.zeros(int(size))
    return lambda: after.copy_(before)


def test_ceiling(case: Case, timed: Timed) -> None:
    sigma = draw_noise(recipe(case.steps), 0, range(BATCH), 1, torch.device("cpu")).sigma
    distinct = len(sigma.unique())
    linear = {name: m for name, m in case.denoiser.named_modules() if isinstance(m, nn.Linear)}
    rows = {name: distinct if "time_" in name else BATCH for name in linear}
    products = training_products(case.denoiser, rows)
    work = label("compute alone", case)
    multiplied = timed(work, CEILING, products, amount=BATCH, unit="rows", rounds=ROUNDS)
    first = sum(rows[n] * linear[n].weight.numel() for n in ("in_proj", "time_embed.0"))
    flops = 3 * case.denoiser.flops_per_row(BATCH / distinct) * BATCH
    assert 2 * (multiplied + first) == pytest.approx(flops)


def test_training_is_the_same_mathematics() -> None:
    config = recipe(steps=3, batch=70, autocast=False)
    data = torch.randn(3, 70, 48, generator=torch.Generator().manual_seed(1))
    start = random_denoiser(48, blocks=3)
    mine, plain = copy.deepcopy(start), copy.deepcopy(start)
    assert our_training(mine, iter(data), config) == pytest.approx(plain_training(plain, iter(data), config), rel=1e-6)
    moved = [torch.dist(p, q) for p, q in zip(mine.parameters(), start.parameters(), strict=True)]
    apart = [torch.dist(p, q) for p, q in zip(mine.parameters(), plain.parameters(), strict=True)]
    assert sum(apart) < 0.01 * sum(moved)


def steps_of(training: Training, start: Denoiser, x: Tensor, config: TrainConfig) -> tuple[list[float], float]:
    """Processor time of each step but the first, over all threads, and the mean loss."""
    began: list[float] = []

    def batches() -> Iterator[Tensor]:
        while True:
            began.append(time.process_time())
            yield x

    loss = training(copy.deepcopy(start), batches(), config)
    return [after - before for before, after in pairwise(began[1:])], loss


@pytest.mark.parametrize("batch", SMALL)
def test_small_batches(batch: int, sized: Sized, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of the recipe `fast` with a prior of 36M parameters; the ways take turns."""
    start = random_denoiser(576, blocks=3)
    x = torch.randn(batch, 576, generator=torch.Generator().manual_seed(1))
    config = recipes.recipe("fast", rows=8 * batch, batch_size=batch)
    rows = {name: batch // 4 if "time_" in name else batch for name, _ in start.named_modules()}
    products, update = training_products(start, rows), update_bytes(start)
    seconds: dict[str, list[float]] = {way: [] for way in (OURS, AUTOCAST, PLAIN, CEILING, AND_BYTES)}
    losses: dict[str, float] = {}
    for _ in range(3):
        for way, training, mixed in (
            (OURS, our_training, True),
            (AUTOCAST, our_training, False),
            (PLAIN, plain_training, False),
        ):
            with monkeypatch.context() as patched:
                if not mixed:
                    patched.setattr(optim, "_mixed", lambda *_: False)
                taken, losses[way] = steps_of(training, start, x, config)
                seconds[way] += taken
        for _ in range(4):
            began = time.process_time()
            products()
            multiplied = time.process_time()
            update()
            seconds[CEILING].append(multiplied - began)
            seconds[AND_BYTES].append(time.process_time() - began)
    threads = torch.get_num_threads()
    for way, taken in seconds.items():
        sized(
            f"a training step, batches of {batch}, d = 576, 3 blocks",
            way,
            threads * batch / statistics.median(taken),
            "rows/s",
        )
    assert losses[AUTOCAST] == pytest.approx(losses[OURS], rel=1e-2)
    assert losses[PLAIN] == pytest.approx(losses[OURS], rel=1e-2)
