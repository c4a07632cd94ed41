"""The shape of the code: imports point downward, each library has its home, nothing runs what it reads."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import glp_lens
from glp_lens.evals.registry import SUITES
from glp_lens.settings import Settings

ROOT = Path(__file__).parents[2]
PACKAGE = Path(importlib.util.find_spec("glp_lens").origin).parent
CLI = Path(importlib.util.find_spec("glp_lens_cli").origin).parent

LAYERS = [
    "types",
    "errors",
    "limits",
    "lazy",
    "settings",
    "arguments",
    "defaults",
    "files",
    "yaml_files",
    "endpoint",
    "numerics",
    "processes",
    "memory",
    "intervals",
    "lm",
    "provenance",
    "hooks",
    "interface",
    "flow",
    "corpus",
    "activations",
    "training",
    "kinds",
    "hub",
    "artifacts",
    "models",
    "directions",
    "display",
    "evals",
    "features",
    "report",
    "scaling",
    "pipeline",
    "doctor",
]
"""Parts of the package, each allowed to import the ones before it."""

HOMES = {
    "transformer_lens": {"lm/opening.py"},
    "sae_lens": {"models/sae.py"},
    "sklearn.decomposition": {"models/pca.py"},
    "h5py": {"activations/shard.py"},
    "jinja2": {"report/html.py"},
    "matplotlib": {"display/plots.py", "report/plots.py"},
    "huggingface_hub": {"lm/opening.py", "hub.py"},
    "transformers": {"lm/gguf_models.py", "lm/opening.py", "lm/checking.py", "evals/steering/judges.py"},
    "yaml": {"yaml_files.py"},
    "pyarrow": {"files.py", "corpus/tables.py"},
    "datasets": {"activations/convert/sae_lens.py", "corpus/hub.py"},
    "httpx": {"endpoint.py"},
    "ray": {"activations/cluster.py"},
    "trackio": {"training/loggers.py"},
    "wandb": {"training/loggers.py"},
    "torch.utils.tensorboard": {"training/loggers.py"},
    "sae_probes": set(),  # read as data: importing it is slow
    "gguf": {"directions/files.py", "lm/gguf_models.py"},
    "typer": set(),
    "click": set(),
    "rich": set(),
}
"""Where each library may be imported, whether at the top of a file or inside a function."""

LATE = ("transformer_lens", "sae_lens", "sklearn.decomposition", "transformers", "matplotlib", "datasets", "httpx",
        "ray", "gguf", "trackio", "wandb", "torch.utils.tensorboard")  # fmt: skip
"""Heavy libraries that no module imports before they are needed."""

CREATORS = {"torch." + name for name in "empty eye full linspace normal ones rand randn zeros".split()}
"""Functions whose result has the caller's default dtype unless they are told another."""

UNSAFE = {"pickle.load", "pickle.loads", "joblib.load", "yaml.load", "os.system", "eval", "exec", "torch.load"}


def sources(folder: Path = PACKAGE) -> dict[str, ast.Module]:
    """Each file of a package, by its path inside it, without what only type checkers read."""
    return {
        path.relative_to(folder).as_posix(): _Runtime().visit(ast.parse(path.read_text(encoding="utf-8")))
        for path in sorted(folder.rglob("*.py"))
    }


class _Runtime(ast.NodeTransformer):
    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        return node.orelse if ast.unparse(node.test) == "TYPE_CHECKING" else node


def imports(tree: ast.AST, package: str = "glp_lens") -> Iterator[str]:
    """Full names of the modules imported anywhere, and of what is imported from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {package}: write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def part(path: str) -> str:
    """The layer a file belongs to; the job of a suite, which is in its package, to that of the other jobs."""
    if path.startswith("evals/") and path.endswith("/job.py"):
        return "pipeline"
    return path.split("/", maxsplit=1)[0].removesuffix(".py")


SOURCES = sources()


def test_every_part_has_its_layer():
    assert {part(path) for path in SOURCES} - {"__init__"} == set(LAYERS)


@pytest.mark.parametrize("path", [path for path in SOURCES if path != "__init__.py"])
def test_imports_point_downward(path):
    own = LAYERS.index(part(path))
    for name in imports(SOURCES[path]):
        if within(name, "glp_lens"):
            target = name.split(".")[1]
            assert target in LAYERS, f"{path} imports {name}: import it from the module that defines it"
            assert LAYERS.index(target) <= own, f"{path} imports {name}, which lies above it"


def test_suites_see_no_concrete_model():
    seen = {(p, n) for p, t in SOURCES.items() if part(p) == "evals" for n in imports(t)}
    assert {(p, n) for p, n in seen if within(n, "glp_lens.models") or within(n, "glp_lens.training")} == set()


def test_suites_do_not_see_each_other():
    for path, tree in SOURCES.items():
        folder = path.split("/")[1] if part(path) == "evals" else ""
        for name in imports(tree) if folder and not folder.endswith(".py") else []:
            if within(name, "glp_lens.evals"):
                assert name.split(".")[2] in {folder, "cache", "entries", "results", "settings", "statistics"}, (
                    f"{path}: {name}"
                )


def test_what_shows_results_sees_results_only():
    """A report can be made of files alone: neither it nor a suite's page needs what measured them."""
    shared = ("display", "errors", "types", "evals.results")
    shows = {
        "display": ("display", "errors", "kinds"),
        "report": (*shared, "report", "files", "kinds", "evals.registry"),
    }
    for path, tree in SOURCES.items():
        allowed = shows.get(part(path), ())
        if part(path) == "evals" and path.endswith(("/page.py", "/plots.py")):
            folder = path.rsplit("/", 1)[0].replace("/", ".")
            allowed = (*shared, *(f"{folder}.{own}" for own in ("plots", "settings")))
        for name in imports(tree) if allowed else ():
            if within(name, "glp_lens"):
                assert any(within(name, f"glp_lens.{a}") for a in allowed), f"{path} imports {name}"


def test_suites_are_alike():
    for suite in SUITES:
        files = {path.rsplit("/", 1)[1] for path in SOURCES if path.startswith(f"evals/{suite.name}/")}
        assert {"__init__.py", "settings.py", "suite.py", "page.py"} <= files
        name = suite.name.title()
        expected = ["entries", "data", "settings", "folder", "allow_mismatch"]
        assert list(inspect.signature(suite.package.run).parameters) == expected
        assert issubclass(getattr(suite.package, f"{name}Settings"), Settings)
        assert dataclasses.is_dataclass(getattr(suite.package, f"{name}Data"))
        assert list(inspect.signature(suite.page.section).parameters)[:3] == ["runs", "frame", "palette"]
        assert list(inspect.signature(suite.page.verdicts).parameters) == ["frame", "focus"]
        assert list(inspect.signature(suite.page.text_table).parameters) == ["results"]
    assert {suite.name for suite in SUITES} == {
        path.split("/")[1] for path in SOURCES if path.startswith("evals/") and path.count("/") > 1
    }


@pytest.mark.parametrize("library", HOMES)
def test_each_library_is_imported_in_its_home_only(library):
    found = {path for path, tree in SOURCES.items() if any(within(n, library) for n in imports(tree))}
    assert found == HOMES[library]


def test_heavy_libraries_are_imported_inside_functions():
    for path, tree in SOURCES.items():
        at_top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        assert not [n for n in imports(at_top) if any(within(n, heavy) for heavy in LATE)], path


def test_nothing_imports_the_command_line_or_the_benchmarks():
    for path, tree in SOURCES.items():
        for name in imports(tree):
            assert name.split(".")[0] not in {"cli", "glp_lens_cli", "benchmarks", "tests"}, f"{path}: {name}"


@pytest.mark.parametrize("folder", [PACKAGE, CLI], ids=["glp_lens", "cli"])
def test_nothing_runs_code_from_a_file(folder):
    """`torch.load` unpickles, so it may be called only where it is told not to."""
    for path, tree in sources(folder).items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            safe = name == "torch.load" and any(
                k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords
            )
            assert safe or name not in UNSAFE, f"{path}:{call.lineno} calls {name}"
            pickled = [k for k in call.keywords if k.arg == "allow_pickle" and ast.unparse(k.value) != "False"]
            assert not pickled, f"{path}:{call.lineno} reads pickles"


def test_whoever_creates_numbers_names_their_dtype():
    for path, tree in SOURCES.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) in CREATORS and ast.unparse(call.args[0]) != "0":  # which makes no numbers
                assert "dtype" in {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"


def loaded_by(statement: str) -> set[str]:
    """Names of the modules in memory after a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import glp_lens",
        "import glp_lens_cli",
        "from glp_lens import InputError",
        *(
            f"import glp_lens.evals.{s}.settings"
            for s in ("probing", "steering", "fidelity", "density", "detect", "generation")
        ),
    ],
)
def test_importing_is_cheap(statement):
    assert loaded_by(statement).isdisjoint({"torch", "transformer_lens", "sae_lens", "sklearn", "pandas"})


def test_importing_the_models_leaves_their_libraries_alone():
    found = loaded_by("from glp_lens import GLP, SAE, PCA, collect")
    assert "torch" in found
    assert found.isdisjoint({"transformer_lens", "sae_lens", "sklearn", "transformers"})


def test_every_public_name_resolves():
    assert sorted(glp_lens.__all__) == sorted(set(glp_lens.__all__))
    for name in glp_lens.__all__:
        assert getattr(glp_lens, name) is not None
        assert name in dir(glp_lens)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        glp_lens.nothing


def test_every_package_is_built_into_the_wheel():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "glp_lens").rglob("__init__.py")}
    assert set(setup["packages"]) == {f.relative_to(ROOT).as_posix().replace("/", ".") for f in folders} | {
        "glp_lens_cli"
    }


MODES = {"no_grad", "enable_grad", "set_grad_enabled", "inference_mode", "autocast", "own", "training", "of_others"}
"""Context managers that change a mode of the thread."""


@pytest.mark.parametrize("path", SOURCES)
def test_no_generator_is_left_while_it_has_changed_a_mode(path):
    """Its caller would have the mode too, and two such generators that take turns restore it in the wrong order."""
    for function in (n for n in ast.walk(SOURCES[path]) if isinstance(n, ast.FunctionDef)):
        if any("contextmanager" in ast.unparse(each) for each in function.decorator_list):
            continue
        for block in (n for n in ast.walk(function) if isinstance(n, ast.With)):
            names = {ast.unparse(item.context_expr).split("(")[0].split(".")[-1] for item in block.items}
            if names & MODES:
                assert not [n for n in ast.walk(block) if isinstance(n, ast.Yield | ast.YieldFrom)], function.name
