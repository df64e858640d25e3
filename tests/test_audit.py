"""`make audit`: the shipped pins are whole, every kind of fault is told, and a service out of reach is said."""

import json
import subprocess
from types import SimpleNamespace

import pytest
from conftest import ROOT

from dual_lora.lab import audit

PROJECT = '[project]\nname = "p"\ndependencies = [{}]\n[project.optional-dependencies]\nmore = []\n'


def test_the_shipped_pins_are_whole():
    wrong = [line for line in audit.faults(ROOT) if "is installed" not in line]
    assert not wrong and len(audit.pins(ROOT)[0]) > 50


@pytest.mark.parametrize(
    ("asked", "constraints", "said"),
    [
        ('"numpy"', "# nothing\n", "numpy: pinned nowhere"),
        ('"no-such>=99"', "no-such==1.0\n", "no-such>=99: constraints.txt has 1.0"),
        ('"x @ git+https://host/x"', "", "from git+https://host/x, not from an index"),
        ("", "numpy>=1\n", "numpy>=1: must be NAME==VERSION"),
        ("", "x @ https://host/x.whl\n", "must be NAME==VERSION"),
        ("", "-e .\n", "-e .: must be NAME==VERSION"),
        ("", "pytest==0.1\n", "is installed, 0.1 pinned"),
    ],
)
def test_faults_of_the_pins_are_told(asked, constraints, said, tmp_path):
    (tmp_path / "pyproject.toml").write_text(PROJECT.format(asked))
    (tmp_path / "constraints.txt").write_text(constraints)
    (fault,) = audit.faults(tmp_path)
    assert said in fault


def test_a_service_that_does_not_answer_is_not_waited_for(monkeypatch):
    def late(*args, timeout, **kwargs):
        raise subprocess.TimeoutExpired("pip-audit", timeout)

    monkeypatch.setattr(subprocess, "run", late)
    assert audit.known_vulnerabilities(ROOT) == ([], f"no answer within {audit.SECONDS} seconds")


GOOD, BAD = {"name": "a", "version": "1", "vulns": []}, {"id": "PYSEC-1", "fix_versions": ["2"]}


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        ([GOOD], 0, "vulnerabilities: none known"),
        ([GOOD | {"vulns": [BAD]}], 1, "a 1: PYSEC-1; mended in 2"),
        ([{"name": "a", "skip_reason": "not found on PyPI"}], 0, "only the pins were checked (not found on PyPI)"),
        ([GOOD, {"name": "b", "skip_reason": "?"}], 0, "1 of 2 packages are not known there"),
        (None, 0, "only the pins were checked (No module named pip_audit)"),
    ],
)
def test_what_the_service_says(answer, code, said, monkeypatch, capsys):
    out = "" if answer is None else json.dumps({"dependencies": answer})
    done = SimpleNamespace(stdout=out, stderr="trace\nNo module named pip_audit\n")
    monkeypatch.setattr(audit, "faults", lambda root: [])
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    assert audit.main() == code
    assert said in capsys.readouterr().out
