"""The notebooks of `docs/notebooks`: what is shipped has outputs, and each runs from its first cell to its last."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from nbformat import validate

import glp_lens as gl
from glp_lens import lm
from glp_lens.defaults import DEFAULT_BACKEND, DEFAULT_DEVICE, DEFAULT_DTYPE, DEFAULT_MODEL
from tests.fuzz.children import fork, wait
from tests.notebooks import NAMES, code_cells, execute, machine_paths, parameters, read, run_cells, texts_of

_PRIOR = {"TOKENS": 800, "ROWS": 1024, "D_MODEL": 64, "D_MLP": 128, "BLOCKS": 2, "NEW_TOKENS": 6}
TINY: dict[str, dict[str, Any]] = {
    "from_saelens": {
        "TOKENS": 1024, "CONTEXT": 32, "LATENTS": 96, "K": 8, "SAE_TOKENS": 4096, "ROWS": 1024, "D_MODEL": 64,
        "D_MLP": 64, "DOCUMENTS": 2,
    },
    "meta_neurons": {**_PRIOR, "D_MLP": 64, "SAMPLE": 512},
    "odd_activations": {
        "TOKENS": 800, "ROWS": 1024, "D_MODEL": 64, "D_MLP": 64, "CALIBRATION": 19, "TESTED": 6, "DETECT_TEXTS": 8,
        "DETECT_FIT": 8, "CONTEXT": 24, "TASKS": ("code", "shuffled"),
    },
    "own_texts": _PRIOR,
    "released_checkpoints": {**_PRIOR, "TEXTS_PER_SIDE": 24},
    "steering_and_repair": {
        **_PRIOR, "TEXTS_PER_SIDE": 24, "STRENGTHS": (0.5, 1.0), "PROMPTS": 2, "JUDGE_TEXTS": 120,
    },
}  # fmt: skip
"""Sizes at which the tests execute each notebook, by the names in its cell of parameters."""
IN_A_KERNEL = "from_saelens"
"""Runs as Jupyter runs it; the others in processes forked from this one, which has opened what they need."""


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
def test_one_runs_in_jupyters_kernel_from_its_first_cell_to_its_last(tmp_path):
    executed = execute(read(IN_A_KERNEL), tmp_path, TINY[IN_A_KERNEL])
    assert not [output for cell in code_cells(executed) for output in cell.outputs if output.output_type == "error"]
    assert all(cell.execution_count for cell in code_cells(executed))


@pytest.fixture(scope="module")
def opening(smollm2: Any) -> Any:
    """`open_model`, with the default model open already, and the packaged corpus in memory."""
    usual = lm.open_model
    gl.corpus.open_corpus()
    defaults = {"device": DEFAULT_DEVICE, "dtype": DEFAULT_DTYPE, "backend": DEFAULT_BACKEND}

    def open_model(name: str = DEFAULT_MODEL, **options: Any) -> Any:
        known = name == DEFAULT_MODEL and defaults | options == defaults
        return smollm2 if known else usual(name, **options)

    return open_model


@pytest.mark.acceptance
@pytest.mark.parametrize("name", [name for name in NAMES if name != IN_A_KERNEL])
def test_it_runs_from_its_first_cell_to_its_last(name, opening, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setattr(lm, "open_model", opening)
    monkeypatch.setattr(gl, "open_model", opening)
    monkeypatch.setenv("MPLBACKEND", "agg")

    def work(folder: Path) -> None:
        folder.mkdir()
        os.chdir(folder)
        with log.open("w") as said:
            sys.stdout = sys.stderr = said
            run_cells(read(name), TINY[name])

    assert wait(fork(partial(work, tmp_path / "work"))) == 0, log.read_text()[-3000:]


def test_paths_of_a_machine_are_found():
    for text in ("at /home/me/x.py", "'/tmp/a'", "<a href=/root/b>", "C:\\Users\\me"):
        assert machine_paths(text), text
    for text in ("results/quickstart", "1/2", "https://example.org/home/page", "a /b/ c", "owner/data"):
        assert not machine_paths(text), text
