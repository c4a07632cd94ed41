"""Executing the notebooks of `docs/notebooks`: in the tests at tiny sizes, and for what is shipped at their own.

`python -m tests.notebooks [NAME ...]` executes the named notebooks, or all of them, and keeps their outputs.
"""

import ast
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
_PATH = re.compile(
    r"(?<![\w.:/~])(?:/(?:home|root|tmp|work|usr|opt|var|srv|mnt|media|data|private|Users|Volumes)\b|[A-Z]:\\)"
)
_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def read(name: str) -> NotebookNode:
    """The notebook of that name, as it is shipped."""
    notebook: NotebookNode = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Its cells of code that are not empty."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def parameters(notebook: NotebookNode) -> tuple[int, dict[str, Any]]:
    """Index of the cell tagged `parameters`, and the literals that it assigns.

    Raises:
        ValueError: no such cell or several, or one that holds anything else than `name = literal`.
    """
    (index,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    values: dict[str, Any] = {}
    for line in ast.parse(notebook.cells[index].source).body:
        if not isinstance(line, ast.Assign) or len(line.targets) != 1 or not isinstance(line.targets[0], ast.Name):
            raise ValueError(f"the cell of parameters holds more than `name = literal`: {ast.unparse(line)}")
        values[line.targets[0].id] = ast.literal_eval(line.value)
    return index, values


def _changed(notebook: NotebookNode, changes: Mapping[str, Any]) -> NotebookNode:
    """A copy without outputs, and with other values of some parameters."""
    copy: NotebookNode = nbformat.from_dict(notebook)
    index, known = parameters(copy)
    if unknown := set(changes) - set(known):
        raise ValueError(f"no parameters of the notebook: {', '.join(sorted(unknown))}")
    for cell in code_cells(copy):
        cell.outputs, cell.execution_count = [], None
    lines = "\n".join(f"{name} = {value!r}" for name, value in changes.items())
    if lines:
        copy.cells.insert(index + 1, nbformat.v4.new_code_cell(lines))
    return copy


def run_cells(notebook: NotebookNode, changes: Mapping[str, Any]) -> None:
    """Execute the cells in this process and its current folder, by IPython, of which a kernel is a server.

    Args:
        notebook, changes: as in `execute`.

    Raises:
        ValueError: a name that is no parameter.
        Exception: what a cell raised.
    """
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    for cell in code_cells(_changed(notebook, changes)):
        shell.run_cell(cell.source).raise_error()


def execute(notebook: NotebookNode, folder: Path, changes: Mapping[str, Any], timeout: int = 600) -> NotebookNode:
    """A copy of the notebook, executed in `folder`, with other values of some parameters.

    Args:
        notebook: as it was read.
        folder: the current folder of its cells; what it writes stays there.
        changes: values by the names of parameters; they are assigned behind the cell of parameters.
        timeout: seconds that one cell may take.

    Raises:
        ValueError: a name that is no parameter.
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    copy = _changed(notebook, changes)
    client = NotebookClient(
        copy, timeout=timeout, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    executed: NotebookNode = client.execute()
    return executed


def texts_of(notebook: NotebookNode) -> list[str]:
    """Everything in its outputs that is text: streams, representations of results, tracebacks."""
    texts = []
    for output in (output for cell in code_cells(notebook) for output in cell.outputs):
        texts += [str(data) for kind, data in output.get("data", {}).items() if not kind.startswith("image/")]
        texts += [output.get("text", ""), *output.get("traceback", ())]
    return texts


def machine_paths(text: str) -> list[str]:
    """What in a text looks like an absolute path of a machine, with what follows."""
    return [text[found.start() : found.start() + 60] for found in _PATH.finditer(text)]


def _tidy(notebook: NotebookNode) -> None:
    """Leave out of an executed notebook what differs from run to run and says nothing: progress, colours, versions."""
    for cell in code_cells(notebook):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if "text" in output:
                output.text = _TERMINAL.sub("", output.text)
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )


def main(names: list[str]) -> None:
    """Execute notebooks at their own sizes, in a temporary folder, and write them with their outputs."""
    for name in names or NAMES:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            executed = execute(read(name), Path(folder), {}, timeout=1800)
        _tidy(executed)
        nbformat.write(executed, FOLDER / f"{name}.ipynb")
        print(f"{name}: {time.monotonic() - began:.0f} s")
        for text in texts_of(executed):
            for path in machine_paths(text):
                print(f"  holds a path of this machine: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
