"""How far each solver's result is from the exact end of the flow, for a number of network evaluations.

    python benchmarks/solver_error.py --model runs/models/glp --store acts_heldout --out docs/results/solvers

Every solver follows the same flow from the same starts, on every grid: in sampling from noise, in projection from
held-out activations noised to the level that `u` means by default. The exact end is that of 1000 steps of the solver of
highest order. The error is the root mean square over rows and dimensions, in normalised space, over that of the exact
ends; the median error takes the median over rows instead of the mean, as a few rows that lie between two modes have
most of the squared error.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

import glp_lens as gl
from glp_lens.evals.results import Results
from glp_lens.evals.statistics import bootstrap_ratio
from glp_lens.flow.path import interpolate
from glp_lens.flow.plan import FAST, Plan, plan
from glp_lens.flow.schedule import SPACINGS, grid, path
from glp_lens.flow.solvers import SOLVERS, integrate, network_calls

REFERENCE = ("ab3", "early")
EULER = "euler-20"
TASKS = {"sample": 0.0, "projection": 0.5}
"""By the released code's u."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a GLP")
    parser.add_argument("--store", type=Path, required=True, help="held-out activations")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--evaluations", default="2,3,4,5,6,8,16,32")
    parser.add_argument("--reference-steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def plans(sigma: float, budgets: list[int]) -> dict[str, Plan]:
    """Each solver on each grid, with as many steps as the evaluations allow; named by its setting."""
    by_setting = {}
    for solver in SOLVERS:
        for name in (*SPACINGS, "released"):
            for budget in budgets:
                for steps in range(budget, 0, -1):
                    # From another level than noise, the released grid is that of `EULER` only.
                    levels = path(sigma, steps, name) if name != "released" else grid(steps)
                    if network_calls(levels, solver) <= budget and (name != "released" or sigma == 1):
                        calls = network_calls(levels, solver)
                        by_setting[f"solver={solver};grid={name};evaluations={calls}"] = Plan(levels, solver)
                        break
    return by_setting


def row_errors(ends: Tensor, exact: Tensor) -> np.ndarray:
    """Mean square over dimensions, relative to that of all exact ends: `(rows,)`."""
    return ((ends - exact).square().mean(1) / exact.square().mean()).double().cpu().numpy()


def measure(results: Results, task: str, glp: gl.GLP, start: Tensor, options: argparse.Namespace) -> None:
    """All plans of one task."""
    slow = plan(u=TASKS[task])
    sigma = float(slow.path[0])
    budgets = [int(n) for n in options.evaluations.split(",")]
    every = {
        f"solver=euler;grid=released;evaluations={slow.network_calls};name={EULER}": slow,
        f"solver={FAST.solver};grid={FAST.grid};evaluations={{}};name=fast": plan(u=TASKS[task], fast=True),
        **plans(sigma, budgets),
    }

    def follow(way: Plan, z: Tensor) -> Tensor:
        steps = tqdm(total=way.network_calls, desc=f"{task} reference", unit="step", mininterval=2, leave=False,
                     disable=len(way.path) < 100)  # fmt: skip

        def velocity(z: Tensor, sigma: float) -> Tensor:
            steps.update()
            return glp.velocity(z, sigma)

        return integrate(velocity, z, *way)

    solver, spacing = REFERENCE
    exact = follow(Plan(path(sigma, options.reference_steps, spacing), solver), start)
    few = min(32, len(start))
    finer = follow(Plan(path(sigma, 2 * options.reference_steps, spacing), solver), start[:few])
    change = float(np.sqrt(row_errors(exact[:few], finer).mean()))
    results.add("reference", task, f"solver={solver};grid={spacing};steps={options.reference_steps}",
                "change_with_twice_the_steps", change, n=few)  # fmt: skip

    rows, base = np.arange(len(start)), None
    for setting, way in tqdm(every.items(), desc=task, unit="setting", mininterval=2):
        error = row_errors(follow(way, start), exact)
        base = error if base is None else base
        label = setting.format(way.network_calls)
        for metric, against in (("error", np.ones_like(error)), (f"ratio_to_{EULER}", base)):
            low = bootstrap_ratio(error, against, rows, seed=options.seed)
            ends = {"ci_low": np.sqrt(low.ci_low), "ci_high": np.sqrt(low.ci_high), "n": len(rows)}
            results.add("glp", task, label, metric, np.sqrt(low.value), **ends)
        results.add("glp", task, label, "median_error", np.sqrt(np.median(error)), n=len(rows))


def table(results: Results) -> pd.DataFrame:
    """The metrics with solver, grid and evaluations as columns."""
    frame = results.frame().query("model == 'glp'")
    parts = pd.DataFrame([dict(pair.split("=") for pair in s.split(";")) for s in frame.setting], index=frame.index)
    return frame.join(parts.fillna({"name": ""}).astype({"evaluations": int}))


def verdict(frame: pd.DataFrame) -> list[str]:
    """The fewest evaluations that have no more error than Euler's 20 steps, by task and measure."""
    sentences = []
    for (task, metric), group in frame[frame.metric.isin(["error", "median_error"])].groupby(["task", "metric"]):
        slow = group[group.name == EULER].iloc[0]
        enough = group[(group.name == "") & (group.value <= slow.value)].sort_values(["evaluations", "value"])
        fast = group[group.name == "fast"].iloc[0]
        best = "no setting has as little"
        if len(enough):
            first = enough.iloc[0]
            best = f"{first.evaluations} evaluations have {first.value:.4f} ({first.solver} on {first.grid})"
        sentences.append(
            f"{task}, {metric}: {slow.evaluations} evaluations of Euler have {slow.value:.4f}; {best}; "
            f"fast has {fast.value:.4f} with {fast.evaluations}"
        )
    return sentences


def draw(file: Path, frame: pd.DataFrame) -> None:
    """Error against evaluations: each solver on the grid that suits it best, Euler's 20 steps as a line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(10, 7.4), layout="constrained")
    panels = figure.subplots(2, len(TASKS), sharex="col", squeeze=False)
    titles = {"sample": "sampling", "projection": "projection, u = 0.5"}
    for row, (metric, words) in zip(
        panels, {"error": "RMS error", "median_error": "median error"}.items(), strict=True
    ):
        for panel, task in zip(row, TASKS, strict=True):
            mine = frame[(frame.task == task) & (frame.metric == metric)]
            slow, fast = (mine[mine.name == name].iloc[0] for name in (EULER, "fast"))
            for i, solver in enumerate(SOLVERS):
                lines = dict(list(mine[(mine.name == "") & (mine.solver == solver)].groupby("grid")))
                few = {name: np.log(g[g.evaluations.between(3, 8)].value).mean() for name, g in lines.items()}
                best = min(few, key=lambda name: few[name])
                line = lines[best].sort_values("evaluations")
                panel.plot(line.evaluations, line.value, "o-", color=f"C{i}", markersize=4, label=f"{solver}, {best}")
                if metric == "error":
                    panel.fill_between(line.evaluations, line.ci_low, line.ci_high, color=f"C{i}", alpha=0.12, lw=0)
            label = f"Euler, 20 steps: {slow.evaluations} evaluations"
            panel.axhline(slow.value, color="0.3", linestyle="--", linewidth=1, label=label)
            panel.plot(fast.evaluations, fast.value, "*", color="black", markersize=13, label="fast", zorder=5)
            panel.set(xscale="log", yscale="log", xlim=(1.8, 36))
            panel.set_xticks([2, 3, 4, 6, 8, 16, 32])
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axis.set_minor_formatter(NullFormatter())
            panel.grid(alpha=0.3)
            panel.legend(frameon=False, fontsize=8, loc="lower left")
        row[0].set_ylabel(f"{words} / RMS of the exact ends")
    for column, task in enumerate(TASKS):
        panels[0][column].set_title(titles[task])
        panels[1][column].set_xlabel("network evaluations")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def main() -> None:
    options = arguments()
    began = time.perf_counter()
    glp = gl.GLP.from_pretrained(options.model).to(options.device)
    store = gl.ActivationStore.open(options.store)
    noise = torch.randn(options.rows, glp.d_in, generator=torch.Generator().manual_seed(options.seed))
    noise = noise.to(options.device)
    data = glp.normalize(store.sample(options.rows, seed=options.seed).float().to(options.device))
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(options).items()}
    origin = {"store": store.provenance(), "model": glp.provenance}
    results = Results("solvers", config=settings, data=origin)
    for task, u in TASKS.items():
        start = noise if u == 0 else interpolate(data, noise, float(plan(u=u).path[0]))
        measure(results, task, glp, start, options)
    frame = table(results)
    results.extras["verdict"] = verdict(frame)
    results.seconds = time.perf_counter() - began
    results.save(options.out)
    draw(options.out / "error.png", frame)
    print(*results.extras["verdict"], sep="\n")


if __name__ == "__main__":
    main()
