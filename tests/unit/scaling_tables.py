"""Tables of a scaling run whose laws are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd

from glp_lens.scaling.cells import UTILITY_COLUMNS, Cell, write_cells, write_utilities

FLOOR, SIZE_POWER, ROWS_POWER, BOUND = 0.95, 0.34, 0.30, 1.43
WIDTHS = {192: 1_000_000, 384: 4_000_000, 768: 16_000_000, 1152: 36_000_000}
"""Parameters by width."""
BUDGETS = (100_000, 300_000, 1_000_000, 3_000_000, 8_000_000)
FEATURES = 576


def loss_of(parameters: float, rows: float) -> float:
    """`E + A / N^a + B / D^b`."""
    of_size, of_rows = math.pow(6e6 / parameters, SIZE_POWER), math.pow(1e6 / rows, ROWS_POWER)
    return FLOOR + 0.12 * of_size + 0.12 * SIZE_POWER / ROWS_POWER * of_rows


def cells(rng: np.random.Generator, widths: dict[int, int] = WIDTHS, budgets: tuple[int, ...] = BUDGETS) -> list[Cell]:
    """Priors with seeds that scatter, SAEs, PCAs, and the two that need no training."""
    made = []
    for width, parameters in widths.items():
        for seed in range(3 if width < 500 else 2):
            luck = 0.0015 * rng.normal()
            for rows in budgets:
                loss = loss_of(parameters, rows) * np.exp(luck + 0.001 * rng.normal())
                trunk = f"glp-w{width}x3"
                made.append(
                    Cell(
                        f"{trunk}-r{rows}-s{seed}", "glp", parameters, rows, rows / 1.1e6, 6.0 * parameters * rows,
                        6.0 * parameters * rows / 4e10, width, 2 * width, 3, seed=seed, trunk=f"{trunk}-s{seed}",
                        loss=float(loss),
                    )
                )  # fmt: skip
    for latents in (1152, 4608):
        for rows in (100_000, 1_000_000, 8_000_000):
            flops = 6.0 * 2 * latents * 576 * rows
            made.append(
                Cell(f"sae-{latents}-r{rows}-s0", "sae", 2 * latents * 576, rows, rows / 1.1e6, flops, flops / 4e10,
                     latents=latents, seed=0)
            )  # fmt: skip
    made += [
        Cell(f"pca-{r}", "pca", (r + 2) * 576, 1_100_000, 1.0, 7e11, 20.0, rank=r) for r in (16, 64, 256, 400, 576)
    ]
    made.append(Cell("gaussian", "gaussian", 576 * 577 // 2, 1_100_000, 1.0, 7e11, 20.0, loss=BOUND))
    made.append(Cell("raw", "raw", 0, 0, 0.0, 0.0, 0.0))
    return made


def utilities(of: list[Cell], rng: np.random.Generator) -> pd.DataFrame:
    """Probing, steering and fidelity: AUC and the area follow the loss, the rest is as far as it goes."""
    rows: list[dict[str, object]] = []

    def add(cell: Cell, suite: str, task: str, setting: str, metric: str, value: float, half: float = 0.01) -> None:
        ends = {"ci_low": value - half, "ci_high": value + half, "n": 40}
        rows.append(dict(zip(UTILITY_COLUMNS, (cell.cell, suite, task, setting, metric, value), strict=False)) | ends)

    for cell in of:
        if cell.loss is not None and cell.kind == "glp":
            auc, area = 0.75 - 0.2 * (cell.loss - 1.1), 0.55 - 0.3 * (cell.loss - 1.1)
            fvu = {0.1: 0.01, 0.2: 0.05, 0.3: 0.12, 0.5: 0.3}
            delta = {sigma: 1.2 * f * (cell.loss / 1.1) ** 3 for sigma, f in fvu.items()}
        elif cell.kind == "sae":
            assert cell.latents is not None
            auc, area = 0.70 + 0.01 * np.log2(cell.latents / 1152) + 0.002 * np.log10(cell.rows), 0.50
            fvu = {8: 0.33, 16: 0.22, 32: 0.18}
            delta = {k: 1.6 * f for k, f in fvu.items()}
        elif cell.kind == "pca":
            assert cell.rank is not None
            auc, area, fvu = 0.66 + 0.0001 * cell.rank, float("nan"), {cell.rank: 0.9 * (16 / cell.rank) ** 0.55}
            delta = {k: 2.0 * f for k, f in fvu.items()}
        elif cell.kind == "raw":
            auc, area, fvu, delta = 0.715, float("nan"), {}, {}
        else:
            continue
        auc += 0.002 * rng.normal()
        features = (1, 16, FEATURES) if cell.kind in ("pca", "raw") else (1, 16, FEATURES, 4096)
        add(cell, "probing", "all", "split=dedup;mode=all", "auc", auc)
        add(cell, "probing", "all", "split=official;mode=all", "auc", auc + 0.02)
        add(cell, "probing", "7_task", "split=dedup;mode=all", "auc", 0.99)
        for count in features:
            add(
                cell,
                "probing",
                "all",
                f"split=dedup;mode=equal;features={count}",
                "auc",
                auc - 0.2 / (1 + np.log(count)),
            )
        if np.isfinite(area):
            own = (
                "sigma=0.6;repair=difference;entry=difference"
                if cell.kind == "glp"
                else "repair=difference;entry=difference"
            )
            add(cell, "steering", "all", own, "pareto_area", area + 0.005 * rng.normal(), 0.03)
            add(cell, "steering", "all", "sigma=0.3;entry=sigma=0.3", "pareto_area", 0.1)
            add(cell, "steering", "all", "entry=plain", "pareto_area", 0.9)
        for level, value in fvu.items():
            setting = f"sigma={level};entry=sigma={level}" if cell.kind == "glp" else f"k={level}"
            add(cell, "fidelity", "heldout", setting, "fvu", value)
            add(cell, "fidelity", "heldout", setting, "delta_nll", delta[level])
        add(cell, "fidelity", "heldout", "entry=mean ablation", "fvu", 1.0)
        add(cell, "fidelity", "heldout", "entry=mean ablation", "delta_nll", 6.5)
    return pd.DataFrame(rows, columns=list(UTILITY_COLUMNS))


def write(folder: Path, seed: int = 0, **which: object) -> list[Cell]:
    """Both tables, as a run writes them."""
    rng = np.random.default_rng(seed)
    made = cells(rng, **which)  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    write_cells(folder, made)
    write_utilities(folder, utilities(made, rng))
    return made
