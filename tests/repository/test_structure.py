"""Rules about the tree: who may import whom, and that names, files and settings agree."""

import ast
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import tasks
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import list_choices
from dual_lora.lab.report.analyses.kinds import KINDS
from dual_lora.lab.study.experiment import ANALYSES
from tests.support.imports import imported
from tests.support.places import ROOT


def name_module(path: Path) -> str:
    """Return the name under which Python imports a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def find_module(name: str, modules: Iterable[str]) -> str | None:
    """Return the module that an imported name is, or is of; None for one of another package."""
    return max((m for m in modules if f"{name}.".startswith(f"{m}.")), key=len, default=None)


FORBIDDEN = {
    "tasks": ("dual_lora", "torch", "transformers", "peft"),
    "dual_lora/tuner": (
        *(f"dual_lora.{package}" for package in ("analysis", "bench", "lab", "paper")),
        *("tasks", "hydra", "datasets", "wandb"),
    ),
    "dual_lora/paper": ("dual_lora", "tasks", "torch", "peft", "hydra", "omegaconf"),
    "dual_lora/kernels": (
        *(f"dual_lora.{package}" for package in ("analysis", "bench", "lab", "paper", "tuner")),
        *("tasks", "peft", "transformers", "hydra", "datasets", "wandb"),
    ),
    "dual_lora/analysis": ("dual_lora.lab", "dual_lora.paper", "tasks", "transformers", "hydra", "pandas"),
    "dual_lora/bench": ("dual_lora.lab", "dual_lora.paper", "tasks", "hydra", "datasets", "wandb"),
    "dual_lora/functional.py": ("dual_lora", "tasks", "peft", "transformers", "hydra"),
    "dual_lora/papers_map.py": ("dual_lora", "tasks", "torch", "peft"),
    "dual_lora/lab": ("train", "eval", "sweep"),
}


# The packages of the harness. One imports from those on the lines above it, and from none on its own line.
LAYERS = (
    {"errors", "statistics"},
    {"config"},
    {"system"},
    {"inputs", "present"},
    {"record"},
    {"model"},
    {"evaluate"},
    {"train", "weights"},
    {"study"},
    {"report"},
    {"commands"},
)
LAB = "dual_lora.lab."
MAX_FILES = 9


def test_packages_import_from_lower_layers_only():
    height = {package: number for number, packages in enumerate(LAYERS) for package in packages}
    places = {path.stem if path.is_file() else path.name for path in (ROOT / "dual_lora/lab").glob("[!_]*")}
    assert places == height.keys()
    for path in (ROOT / "dual_lora/lab").rglob("[!_]*.py"):
        package = path.relative_to(ROOT / "dual_lora/lab").parts[0].removesuffix(".py")
        for other in {name.removeprefix(LAB).split(".")[0] for name in imported(path) if name.startswith(LAB)}:
            assert other == package or height[other] < height[package], f"{path} imports from {other}"


def test_no_file_imports_itself_over_others():
    files = {name_module(path): path for path in (ROOT / "dual_lora").rglob("*.py")}
    known = {name: {find_module(n, files) for n in imported(path)} - {None} for name, path in files.items()}
    while leaves := [name for name, others in known.items() if not others]:
        known = {name: others - set(leaves) for name, others in known.items() if name not in leaves}
    assert not known, f"circles among {sorted(known)}"


def test_no_folder_holds_more_files_than_a_reader_keeps_in_mind():
    for folder in {path.parent for path in (ROOT / "dual_lora/lab").rglob("*.py")}:
        assert len(list(folder.glob("*.py"))) <= MAX_FILES, folder


def test_no_test_module_imports_another():
    """What several of them need is in tests/support, a fixture in the conftest.py of their room."""
    files = [*(ROOT / "tests").rglob("*.py")]
    modules = {path.stem for path in files if path.stem.startswith("test_")} | {"conftest"}
    for path in files:
        for name in imported(path):
            assert not modules & set(name.split(".")), f"{path} imports {name}"


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_import_directions(folder):
    place = ROOT / folder
    for path in [place] if place.is_file() else place.rglob("*.py"):
        for name in imported(path):
            assert not any(name == f or name.startswith(f + ".") for f in FORBIDDEN[folder]), f"{path} imports {name}"


# What works with the package's own dependencies; the other files of its folder need the extra `analysis`.
PLAIN_ANALYSIS = ("__init__", "entries", "memory", "spectrum", "truncation", "update")


@pytest.mark.parametrize("name", PLAIN_ANALYSIS)
def test_the_plain_analyses_need_only_torch_and_the_map(name):
    found = imported(ROOT / f"dual_lora/analysis/{name}.py")
    others = {n for n in found if n.split(".")[0] not in sys.stdlib_module_names | {"torch"}}
    allowed = tuple(f"dual_lora.analysis.{n}." for n in PLAIN_ANALYSIS)
    assert all(n.startswith(("dual_lora.functional.", *allowed)) for n in others), others


def test_methods_and_tasks_do_not_know_each_other():
    methods = {OmegaConf.load(ROOT / "conf/method" / f"{m}.yaml").name for m in list_choices("method")}
    methods -= {"none"}  # a word of other meanings, too
    for path in (ROOT / "tasks").glob("*.py"):
        strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not methods & strings, path
    for path in (ROOT / "dual_lora/lab").rglob("*.py"):
        strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not strings & {*methods - {"full"}, "glue", "demo"}, path  # "full" is a sharding and a scale, too


@pytest.mark.parametrize("group", ["model", "task", "method"])
def test_the_name_of_a_choice_is_the_name_of_its_file(group):
    for choice in list_choices(group):
        assert OmegaConf.load(paths.CONF / group / f"{choice}.yaml").name == choice


@pytest.mark.parametrize("name", list_choices("task"))
def test_every_task_setting_has_its_module(name):
    task = tasks.load(name)
    assert task.name == name and task.version >= 1 and task.metric


def test_every_analysis_that_an_experiment_may_name_has_a_kind():
    assert tuple(KINDS) == ANALYSES
    for kind in KINDS.values():
        module, name = kind.function.split(":")
        assert callable(getattr(import_module(f"dual_lora.lab.weights.{module}"), name))


def reads_in_the_encoding_of_the_locale(call: ast.Call) -> bool:
    """Return whether a call opens, reads or writes text without naming its encoding."""
    is_method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if is_method else getattr(call.func, "id", "")
    places = {"read_text": 0, "write_text": 1, "open": 2 if is_method else 3}  # of the argument `encoding`
    if name not in places or ast.unparse(call.func) == "os.open":
        return False
    mode = ast.unparse(call.args[not is_method]) if name == "open" and len(call.args) > (not is_method) else ""
    return "b" not in mode and len(call.args) <= places[name] and "encoding" not in {k.arg for k in call.keywords}


def test_no_text_depends_on_the_locale():
    files = [*(path for folder in ("dual_lora", "tasks", "tools") for path in (ROOT / folder).rglob("*.py"))]
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in [*files, *ROOT.glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and reads_in_the_encoding_of_the_locale(node)
    ]
    assert not found, "name encoding='utf-8'"


def test_entry_points_are_short_and_imported_by_nothing():
    for script in ROOT.glob("*.py"):
        assert len(script.read_text().splitlines()) < 100


def list_public_functions(path: Path) -> list[ast.FunctionDef]:
    """Return the public functions of a file and the public methods of its classes."""
    tree = ast.parse(path.read_text())
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    return [n for body in bodies for n in body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]


def walk_own_code(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below one, without those of functions and classes defined inside it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            yield child
            yield from walk_own_code(child)


def raises_error(node: ast.AST) -> bool:
    """Return whether a statement makes an error, or calls `require`. Not meant: `raise`, `raise error`, and
    NotImplementedError, which says what a subclass must define."""
    if isinstance(node, ast.Raise):
        return isinstance(node.exc, ast.Call | ast.Attribute) and "NotImplementedError" not in ast.unparse(node.exc)
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require"


@pytest.mark.parametrize("folder", ["dual_lora", "tasks"])
def test_docstrings_name_the_errors_that_public_functions_raise(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for function in list_public_functions(path):
            silent = "Raises:" not in (ast.get_docstring(function) or "")
            lines = [node.lineno for node in walk_own_code(function) if raises_error(node)]
            assert not (silent and lines), f"{path}:{lines[0]}: {function.name} raises, its docstring has no Raises:"


def test_no_two_public_functions_of_the_harness_share_a_name():
    found: dict[str, Path] = {}
    for path in (ROOT / "dual_lora/lab").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert found.setdefault(node.name, path) == path, f"{node.name}: in {found[node.name]} and in {path}"
