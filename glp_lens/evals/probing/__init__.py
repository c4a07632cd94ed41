"""Sparse probing: the AUC of the best single feature on binary tasks.

Load tasks with `load`, run their texts through the language model with `collect`, compare models with `run`.
"""

from glp_lens.evals.probing.activations import TaskActivations, collect, task_activations
from glp_lens.evals.probing.suite import run
from glp_lens.evals.probing.tasks import DEFAULT_TASKS, Split, Task, build, load, names

__all__ = [
    "DEFAULT_TASKS",
    "Split",
    "Task",
    "TaskActivations",
    "build",
    "collect",
    "load",
    "names",
    "run",
    "task_activations",
]
