"""A plugin that is a module of an installed package: all of the package counts, and it is named as it was imported."""

import json
import sys

import pytest

import tasks
from dual_lora.lab.config.outside.plugins import check_plugins, describe_plugins, locate_plugins
from dual_lora.lab.config.outside.words import take_outside_words
from dual_lora.lab.errors import UserError
from dual_lora.lab.study.launch.process import restore_outside

PACKAGE = "some_installed_package"


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / PACKAGE
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "scoring.py").write_text("WEIGHT = 1\n")
    (folder / "stars.py").write_text("from .scoring import WEIGHT\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    take_outside_words([])
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]


def describe_again() -> dict:
    take_outside_words([f"plugins={PACKAGE}.stars"])
    return describe_plugins()


def test_code_that_the_module_imports_from_its_package_counts(package):
    before = describe_again()
    (package / "scoring.py").write_text("WEIGHT = 2\n")
    after = describe_again()
    assert before["stars"]["path"] == after["stars"]["path"] == "stars.py"
    with pytest.raises(UserError, match="changed since the run was done"):
        check_plugins(before, "the run")


def test_a_launchers_process_imports_it_by_its_name(package, tmp_path):
    describe_again()
    (tmp_path / "command.json").write_text(json.dumps({"plugins": locate_plugins(), "settings": []}))
    take_outside_words([])
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]  # a new process
    restore_outside(tmp_path)
    assert tasks.plugins["stars"].module.WEIGHT == 1


def test_a_record_says_how_to_name_it(package):
    recorded = describe_again()
    take_outside_words([])
    with pytest.raises(UserError, match=f"add plugins={PACKAGE}.stars$"):
        check_plugins(recorded, "the run")
