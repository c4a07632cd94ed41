"""The notebooks of `docs/notebooks`: what is shipped has outputs, and each runs from its first cell to its last."""

from typing import Any

import pytest
from nbformat import validate

from tests.notebooks import NAMES, code_cells, execute, machine_paths, parameters, read, texts_of

_PRIOR = {"TOKENS": 1500, "ROWS": 1024, "D_MODEL": 64, "D_MLP": 128, "BLOCKS": 2, "NEW_TOKENS": 6}
TINY: dict[str, dict[str, Any]] = {
    "from_saelens": {
        "TOKENS": 1024, "CONTEXT": 32, "LATENTS": 96, "K": 8, "SAE_TOKENS": 4096, "ROWS": 1024, "D_MODEL": 64,
        "D_MLP": 64, "DOCUMENTS": 2,
    },
    "meta_neurons": {**_PRIOR, "D_MLP": 64, "SAMPLE": 512},
    "odd_activations": {
        "TOKENS": 1500, "ROWS": 1024, "D_MODEL": 64, "D_MLP": 64, "CALIBRATION": 19, "TESTED": 6, "DETECT_TEXTS": 8,
        "DETECT_FIT": 8, "CONTEXT": 24, "TASKS": ("code", "shuffled"),
    },
    "own_texts": _PRIOR,
    "released_checkpoints": {**_PRIOR, "TEXTS_PER_SIDE": 24},
    "steering_and_repair": {
        **_PRIOR, "TEXTS_PER_SIDE": 24, "STRENGTHS": (0.5, 1.0), "PROMPTS": 2, "JUDGE_TEXTS": 120,
    },
}  # fmt: skip
"""Sizes at which the tests execute each notebook, by the names in its cell of parameters."""


def test_every_notebook_has_its_tiny_sizes():
    assert sorted(TINY) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_is_shipped_was_executed_in_order_and_holds_no_paths_of_a_machine(name):
    notebook = read(name)
    validate(notebook)
    parameters(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture"
    assert sum(bool(cell.outputs) for cell in cells) > len(cells) / 2
    texts = [*texts_of(notebook), *(cell.source for cell in notebook.cells)]
    assert [path for text in texts for path in machine_paths(text)] == []


@pytest.mark.acceptance
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_its_first_cell_to_its_last(name, tmp_path):
    executed = execute(read(name), tmp_path, TINY[name])
    assert not [output for cell in code_cells(executed) for output in cell.outputs if output.output_type == "error"]
    assert all(cell.execution_count for cell in code_cells(executed))


def test_paths_of_a_machine_are_found():
    for text in ("at /home/me/x.py", "'/tmp/a'", "<a href=/root/b>", "C:\\Users\\me"):
        assert machine_paths(text), text
    for text in ("results/quickstart", "1/2", "https://example.org/home/page", "a /b/ c", "owner/data"):
        assert not machine_paths(text), text
