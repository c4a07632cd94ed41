"""Made-up results of a probing run, of any size, in the shape the suite writes them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glp_lens.evals.results import Results
from glp_lens.types import Json

VIEWS = tuple(f"split={split};mode={mode}" for split in ("official", "dedup") for mode in ("paper", "all"))
GAINS = {"glp": 0.03, "sae": 0.0, "pca": -0.01, "raw": 0.01, "random": -0.03, "neurons": 0.015}
FEATURES = {"glp": 9216, "sae": 8192, "pca": 576, "raw": 576, "random": 9216, "neurons": 1536}
BLOCKS = 6
SIZES = (1, 4, 16, 64, 256, 576, 1536, 8192, 9216, 27648)
KS = ("1", "2", "5", "16", "64", "128", "dense")
EVIL = "<script>alert('x')</script> & co"


@dataclass
class _Run:
    """Results in the making: `gains` by which each model is better than the mean one."""

    results: Results
    tasks: Sequence[str]
    ease: dict[str, float]
    gains: dict[str, float]
    n_families: int
    rng: np.random.Generator

    def over_all(self, label: str, setting: str, metric: str, value: float, half: float = 0.01) -> None:
        ends = {"ci_low": value - half, "ci_high": value + half}
        self.results.add(label, "all", setting, metric, value, **ends, n=self.n_families)

    def tasks_and_mean(self, label: str, setting: str, metric: str, gain: float) -> None:
        values = np.clip([self.ease[t] + gain + self.rng.normal(0, 0.03) for t in self.tasks], 0.42, 1.0)
        for task, value in zip(self.tasks, values, strict=True):
            ends = {"ci_low": max(value - 0.03, 0.3), "ci_high": min(value + 0.03, 1.0)}
            self.results.add(label, task, setting, metric, value, **ends, n=777)
        self.over_all(label, setting, metric, float(values.mean()), 0.02)

    def pairs(self, setting: str, main: Sequence[str], factor: float = 1.0) -> None:
        for i, a in enumerate(main):
            for b in main[i + 1 :]:
                gap = self.gains[a] - self.gains[b]
                self.over_all(a, setting, f"auc_diff:{b}", factor * gap)
                self.over_all(a, setting, f"win_rate:{b}", 0.5 + 8 * gap, 0.09)
                self.results.add(a, "all", setting, f"p_holm:{b}", min(1.0, 0.001 / abs(gap)), n=self.n_families)


def probing_results(
    tasks: Sequence[str],
    families: Sequence[str],
    *,
    models: Sequence[str] = tuple(GAINS),
    sigmas: Sequence[float] = (0.1,),
    sparse: bool = False,
) -> Results:
    """A run on these tasks. With several noise levels it also has their concatenation, blocks and feature counts."""
    rng = np.random.default_rng(0)
    entries, gains = _entries(models, sigmas)
    main = [label for label, entry in entries.items() if entry["main"]]
    results = Results("probing", config={"max_features": 512, "entries": entries})
    results.data = {
        "context": 128,
        "pooling": "last",
        "hook": "blocks.14.hook_resid_post",
        "tasks": {
            task: {"family": family, "classes": ["other", f"class of {family}"],
                   "official": {"train": 1024, "test": 1024}, "dedup": {"train": 903, "test": 777}}
            for task, family in zip(tasks, families, strict=True)
        },
    }  # fmt: skip
    ease = dict(zip(tasks, np.clip(rng.normal(0.72, 0.12, len(tasks)), 0.5, 0.97), strict=True))
    run = _Run(results, tasks, ease, gains, len(set(families)), rng)
    for setting in VIEWS:
        for label, gain in gains.items():
            _view(run, label, setting, gain + 0.02 * ("official" in setting), entries[label]["n_features"])
        run.pairs(setting, main)
    for split in ("split=official", "split=dedup"):
        run.tasks_and_mean("dense", split, "auc", 0.14)
        if len(sigmas) > 1:
            _sweep(run, split, entries)
            run.pairs(f"{split};mode=equal;features=576", main, -0.5)
        for i, k in enumerate(KS if sparse else ()):
            for ranking in ("", "rank=difference;"):
                setting = f"{split};probe=sparse;{ranking}k={k}"
                for label in main:
                    for metric in ("auc", "accuracy", "f1"):
                        run.over_all(label, setting, metric, 0.73 + gains[label] + 0.025 * i, 0.02)
                run.pairs(setting, main)
    results.extras["best"] = [_best(label, task, ease[task] + gain) for label, gain in gains.items() for task in tasks]
    results.failures = [f"{tasks[0]}, split=dedup: skipped, smaller class has 3 train rows (needs 5)"]
    return results


def _entries(models: Sequence[str], sigmas: Sequence[float]) -> tuple[dict[str, Json], dict[str, float]]:
    """`config["entries"]` and the gains, the GLP last."""
    others = [m for m in models if m != "glp"]
    entries: dict[str, Json] = {m: {"kind": m, "hook": None, "main": True, "n_features": FEATURES[m]} for m in others}
    gains = {m: GAINS[m] for m in entries}
    for sigma in sigmas if "glp" in models else ():
        label = "glp" if len(sigmas) == 1 else f"glp sigma={sigma:g}"
        entries[label] = {"kind": "glp", "main": sigma == sigmas[0], "n_features": 9216, "sigma": sigma}
        gains[label] = GAINS["glp"] - 0.05 * abs(sigma - sigmas[0])
    if "glp" in models and len(sigmas) > 1:
        label = "glp sigma=" + "+".join(f"{s:g}" for s in sorted(sigmas))
        entries[label] = {"kind": "glp", "main": False, "n_features": 9216 * len(sigmas), "sigma": sorted(sigmas)}
        gains[label] = GAINS["glp"] + 0.005
    return entries, gains


def _view(run: _Run, label: str, setting: str, gain: float, n_features: int) -> None:
    run.tasks_and_mean(label, setting, "auc", gain)
    run.tasks_and_mean(label, setting, "auc_validation", gain + 0.03)
    run.over_all(label, setting, "optimism", 0.031 if "all" in setting else 0.018)
    run.over_all(label, setting, "auc_null", 0.5 + 0.018 * np.sqrt(2 * np.log(n_features)))
    run.over_all(label, setting, "auc_oracle", 0.8 + gain)
    for task in run.tasks:
        run.results.add(label, task, setting, "n_candidates", n_features if "all" in setting else 512)


def _sweep(run: _Run, split: str, entries: dict[str, Json]) -> None:
    for label, entry in entries.items():
        gain = run.gains[label]
        for block in range(BLOCKS if isinstance(entry.get("sigma"), float) else 0):
            run.over_all(label, f"{split};mode=all;layer={block}", "auc", 0.74 + gain - 0.008 * abs(block - 2), 0.02)
        for k in (k for k in SIZES if k <= entry["n_features"]):
            run.over_all(label, f"{split};mode=equal;features={k}", "auc", 0.72 + gain - 0.2 * (k + 1) ** -0.3, 0.02)


def _best(label: str, task: str, auc: float) -> Json:
    texts = [
        {"text": f"… the words before the end of text {i} of {task}, {EVIL}", "value": 9.1 - i, "label": i % 2}
        for i in range(5)
    ]
    return {"model": label, "task": task, "feature": 1536 * 3 + 812, "layer": 3 if label.startswith("glp") else None,
            "neuron": 812, "sign": -1 if len(task) % 3 else 1, "auc": auc, "auc_validation": auc + 0.03,
            "texts": texts}  # fmt: skip
