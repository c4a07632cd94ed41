"""Sparse probing: the AUC of the best single feature on binary tasks.

Load tasks with `load`, run their texts through the language model with `collect`, compare models with `run`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from glp_lens.lazy import exports

if TYPE_CHECKING:
    from glp_lens.evals.probing.activations import TaskActivations, TaskRows, collect
    from glp_lens.evals.probing.own_tasks import from_file, from_store, open_tasks
    from glp_lens.evals.probing.peers import as_sae
    from glp_lens.evals.probing.settings import Pooling, ProbingSettings, TaskSettings
    from glp_lens.evals.probing.suite import ProbingData, run
    from glp_lens.evals.probing.tasks import DEFAULT_TASKS, Split, Task, build, load, names

__all__ = [
    "DEFAULT_TASKS",
    "Pooling",
    "ProbingData",
    "ProbingSettings",
    "Split",
    "Task",
    "TaskActivations",
    "TaskRows",
    "TaskSettings",
    "as_sae",
    "build",
    "collect",
    "from_file",
    "from_store",
    "load",
    "names",
    "open_tasks",
    "run",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "activations": ("TaskActivations", "TaskRows", "collect"),
        "own_tasks": ("from_file", "from_store", "open_tasks"),
        "peers": ("as_sae",),
        "settings": ("Pooling", "ProbingSettings", "TaskSettings"),
        "suite": ("ProbingData", "run"),
        "tasks": ("DEFAULT_TASKS", "Split", "Task", "build", "load", "names"),
    },
)
