"""Sparse probing: the AUC of the best single feature on binary tasks.

Load tasks with `load`, run their texts through the language model with `collect`, compare models with `run`.
"""

from glp_lens.evals.probing.activations import Pooling, TaskActivations, TaskRows, collect
from glp_lens.evals.probing.own_tasks import from_file, from_store, open_tasks
from glp_lens.evals.probing.peers import as_sae
from glp_lens.evals.probing.suite import run
from glp_lens.evals.probing.tasks import DEFAULT_TASKS, Split, Task, build, load, names

__all__ = [
    "DEFAULT_TASKS",
    "Pooling",
    "Split",
    "Task",
    "TaskActivations",
    "TaskRows",
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
