"""Validation loss of the training recipes for the rows and the time that they take.

    python benchmarks/loss_for_compute.py --store acts --validation acts_heldout --out docs/results/loss-for-compute

The first recipe is the reference, with a budget of its own. The others are trained on every budget,
each time with a learning rate that falls to its end there, and the smallest budget that reaches the final loss of each
recipe named before is printed. All train the same network, from the same seeds. Every finished training is kept in
`--out`/runs, and one that was interrupted continues at its last saved state: start the command again. What a
row costs in time is measured at the end, for all recipes one after the other: let nothing else run then.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import t
from tqdm.auto import tqdm

import glp_lens as gl
from glp_lens.evals.results import Results
from glp_lens.files import read_json, write_json
from glp_lens.training.config import recipe
from glp_lens.types import Json

LOSS = "validation_loss"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("acts"), help="activations to train on")
    parser.add_argument("--validation", type=Path, required=True, help="store of held-out activations")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", default="paper,small,fast", help="the first is the reference")
    parser.add_argument("--reference-rows", type=int, default=1048576, help="rows that the reference sees")
    parser.add_argument("--rows", default="32768,65536,131072,262144", help="budgets of rows that the others see")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--validation-rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--mlp", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def training(options: argparse.Namespace, store: gl.ActivationStore, held_out: torch.Tensor, run: Json) -> Json:
    """One training: its settings, and its losses by rows seen."""
    key = run | shape(options) | {"store": store.fingerprint, "device": options.device}
    name = f"{run['recipe']}-{run['rows']}-{run['seed']}"
    path, state = options.out / "runs" / f"{name}.json", options.out / "runs" / f"{name}.safetensors"
    if path.exists() and (kept := read_json(path, "training"))["key"] == key:
        return kept
    config = recipe(run["recipe"], run["rows"], seed=run["seed"])
    model = gl.GLP.fit(
        store, config, device=options.device, validation=held_out, run=gl.RunOptions(state=state), **shape(options)
    )
    curve = [{"rows": e["rows"], LOSS: e[LOSS]} for e in model.history]
    result = {"key": key, **run, "made_by": model.provenance["training"], "curve": curve}
    write_json(path, result)
    state.unlink(missing_ok=True)
    return result


def shape(options: argparse.Namespace) -> Json:
    """Of the network, the same for all."""
    return {"d_model": options.width, "d_mlp": options.mlp, "n_layers": options.layers}


def seconds_per_row(options: argparse.Namespace, store: gl.ActivationStore, name: str) -> float:
    """What a row takes to train on, loading included: the median of some short trainings, one after the other.

    Apart from the trainings whose losses are reported, which may run beside other work.
    """
    durations = []
    config = recipe(name, max(recipe(name, sys.maxsize).batch_size, 8192))
    for _ in range(3):
        began = time.perf_counter()
        gl.GLP.fit(store, config, device=options.device, **shape(options))
        durations.append((time.perf_counter() - began) / config.rows)
    return float(np.median(durations))


def summary(runs: list[Json]) -> pd.DataFrame:
    """Final loss and time by recipe and budget: mean, standard deviation and number of seeds."""
    last = pd.DataFrame([{"recipe": r["recipe"], "budget": r["rows"], **r["curve"][-1]} for r in runs])
    table = last.groupby(["recipe", "budget"], sort=False).agg(
        loss=(LOSS, "mean"), sd=(LOSS, "std"), seconds=("seconds", "mean"), seeds=(LOSS, "size")
    )
    return table.reset_index()


def to_results(options: argparse.Namespace, runs: list[Json], bound: float, store: gl.ActivationStore) -> Results:
    """All as metrics; the intervals are Student's, over seeds."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    results = Results("loss-for-compute", config=settings, data=store.provenance(), extras={"runs": runs})
    for row in summary(runs).itertuples():
        margin = t.ppf(0.975, row.seeds - 1) * row.sd / np.sqrt(row.seeds) if row.seeds > 1 else np.nan
        setting = f"rows={row.budget}"
        interval = {"ci_low": row.loss - margin, "ci_high": row.loss + margin}
        results.add(row.recipe, "all", setting, LOSS, row.loss, n=row.seeds, **interval)
        results.add(row.recipe, "all", setting, "seconds", row.seconds, n=row.seeds)
    results.add("gaussian", "all", "", "optimal_loss", bound)
    results.seconds = sum(r["curve"][-1]["seconds"] for r in runs)
    return results


def verdict(table: pd.DataFrame) -> list[str]:
    """What each recipe needs to reach the final loss of those before it on the largest budget, a sentence each."""
    names, sentences = list(table.recipe.unique()), []
    for i, name in enumerate(names[:-1] or names):
        target = table[table.recipe == name].iloc[-1]
        sentences.append(f"{_cost(target)}:")
        for other in names[i + 1 :]:
            mine = table[table.recipe == other]
            reached = mine[mine.loss <= target.loss]
            if reached.empty:
                sentences.append(f"  {other} does not reach it: {mine.loss.min():.4f} at best")
                continue
            first = reached.iloc[0]
            sentences.append(
                f"  {_cost(first)}: {target.budget / first.budget:.1f} times fewer rows, "
                f"{target.seconds / first.seconds:.1f} times less time"
            )
    return sentences


def _cost(row: pd.Series) -> str:
    return (
        f"{row.recipe} reaches {row.loss:.4f} (sd {row.sd:.4f}, {row.seeds} seeds) with {row.budget:,} rows in "
        f"{row.seconds:.0f} s"
    )


def draw(path: Path, runs: list[Json], bound: float) -> None:
    """Losses along each training, mean and range over the seeds, against rows and against seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(r["recipe"] for r in runs))
    for panel, axis in zip(panels, ("rows", "seconds"), strict=True):
        for i, name in enumerate(names):
            mine = [r for r in runs if r["recipe"] == name]
            for rows in {r["rows"] for r in mine}:
                curves = [pd.DataFrame(r["curve"]) for r in mine if r["rows"] == rows]
                loss, at = (np.stack([c[k] for c in curves]) for k in (LOSS, axis))
                longest = rows == max(r["rows"] for r in mine)
                style = {"color": f"C{i}", "alpha": 1.0 if longest else 0.4}
                panel.plot(at.mean(0), loss.mean(0), label=name if longest else None, **style)
                panel.fill_between(at.mean(0), loss.min(0), loss.max(0), color=f"C{i}", alpha=0.2, linewidth=0)
                panel.plot(at.mean(0)[-1], loss.mean(0)[-1], "o", markersize=4, **style)
        panel.axhline(bound, color="0.4", linestyle="--", linewidth=1, label="best Gaussian")
        panel.set(xscale="log", xlabel={"rows": "rows seen", "seconds": "seconds of training"}[axis])
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="validation loss")
    panels[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    options = arguments()
    store = gl.ActivationStore.open(options.store)
    held_out = gl.ActivationStore.open(options.validation).sample(options.validation_rows, seed=0)
    budgets = sorted(int(n) for n in options.rows.split(","))
    first, *others = options.recipes.split(",")
    # Seed by seed, so that what is there after an interruption can be compared.
    plan = [
        {"recipe": name, "rows": rows, "seed": seed}
        for seed in range(options.seeds)
        for name, rows in [(first, options.reference_rows), *((n, rows) for n in others for rows in budgets)]
    ]
    runs = [training(options, store, held_out, run) for run in tqdm(plan, desc="trainings", unit="run")]
    rates = {name: seconds_per_row(options, store, name) for name in (first, *others)}
    for run in runs:
        run["curve"] = [point | {"seconds": point["rows"] * rates[run["recipe"]]} for point in run["curve"]]
    bound = gl.Gaussian.fit(store).optimal_loss_mean()
    to_results(options, runs, bound, store).save(options.out)
    draw(options.out / "curves.png", runs, bound)
    table = summary(runs)
    print(table.to_string(index=False, float_format="%.4f"))
    print(f"best Gaussian: {bound:.4f}", *verdict(table), sep="\n")


if __name__ == "__main__":
    main()
