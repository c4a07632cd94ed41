"""The examples in the docstrings of the library run as they stand, offline, in an empty folder."""

import doctest
import importlib
import importlib.util
import operator
from pathlib import Path

import pytest

import glp_lens

PACKAGE = Path(importlib.util.find_spec("glp_lens").origin).parent
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def modules() -> list[str]:
    """Modules whose source has an example: only these are imported."""
    paths = [p for p in sorted(PACKAGE.rglob("*.py")) if ">>> " in p.read_text(encoding="utf-8")]
    names = [".".join(("glp_lens", *p.relative_to(PACKAGE).with_suffix("").parts)) for p in paths]
    return [name.removesuffix(".__init__") for name in names]


@pytest.mark.parametrize("module", modules())
def test_examples(module, tmp_path, monkeypatch):
    examples = [test for test in doctest.DocTestFinder().find(importlib.import_module(module)) if test.examples]
    assert examples
    for number, example in enumerate(examples):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        report: list[str] = []
        doctest.DocTestRunner(optionflags=FLAGS).run(example, out=report.append)
        assert not report, "".join(report)


EXAMPLES = """
    ActivationStore ActivationStore.batches GLP Gaussian PCA StoreDataset TrainConfig recipe
    hooks.edit hooks.project hooks.steer
""".split()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_most_used_names_have_an_example(name):
    assert ">>> " in operator.attrgetter(name)(glp_lens).__doc__
