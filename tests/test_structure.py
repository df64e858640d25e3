"""Rules about the tree: who may import whom, and that names, files and settings agree."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

import tasks
from dual_lora.lab import cli


def imported(path: Path) -> set[str]:
    """Return the modules a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FORBIDDEN = {
    "tasks": ("dual_lora", "torch", "transformers", "peft"),
    "dual_lora/tuner": ("dual_lora.lab", "tasks", "hydra", "datasets", "wandb"),
    "dual_lora/paper": ("dual_lora", "tasks", "torch", "peft", "hydra", "omegaconf"),
    "dual_lora/kernels": ("dual_lora", "tasks", "peft", "transformers", "hydra", "datasets", "wandb"),
    "dual_lora/analysis": ("dual_lora.lab", "dual_lora.paper", "tasks", "transformers", "hydra", "pandas"),
    "dual_lora/functional.py": ("dual_lora", "tasks", "peft", "transformers", "hydra"),
    "dual_lora/lab": ("train", "eval", "sweep"),
}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_import_directions(folder):
    place = ROOT / folder
    for path in [place] if place.is_file() else place.rglob("*.py"):
        for name in imported(path):
            assert not any(name == f or name.startswith(f + ".") for f in FORBIDDEN[folder]), f"{path} imports {name}"


def test_methods_and_tasks_do_not_know_each_other():
    methods = {OmegaConf.load(ROOT / "conf/method" / f"{m}.yaml").name for m in cli.choices("method")}
    for path in (ROOT / "tasks").glob("*.py"):
        strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not methods & strings, path
    for path in (ROOT / "dual_lora/lab").glob("*.py"):
        strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not strings & {"lora", "lora_plus", "dora", "dual_lora", "glue", "demo"}, path


@pytest.mark.parametrize("group", ["model", "task", "method"])
def test_the_name_of_a_choice_is_the_name_of_its_file(group):
    for choice in cli.choices(group):
        assert OmegaConf.load(cli.CONF / group / f"{choice}.yaml").name == choice


@pytest.mark.parametrize("name", cli.choices("task"))
def test_every_task_setting_has_its_module(name):
    task = tasks.load(name)
    assert task.name == name and task.version >= 1 and task.metric


def test_entry_points_are_short_and_imported_by_nothing():
    for script in ROOT.glob("*.py"):
        assert len(script.read_text().splitlines()) < 100
