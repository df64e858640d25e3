"""The environments of `make test-torch`: which releases they hold, and that a kept one is used again."""

import subprocess

import pytest

from tests.support.places import ROOT
from tools import try_environments


def test_the_oldest_releases_are_those_that_the_package_allows():
    allowed = (ROOT / "pyproject.toml").read_text()
    floors = [pin.split("==") for pin in try_environments.list_floors()]
    assert [name for name, _ in floors] == ["torch", "peft"]
    assert all(f'"{name}>={version}"' in allowed or f'"{name}>={version},' in allowed for name, version in floors)


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """The commands that would be run, in their order."""
    found = []

    def note(command, **_):
        found.append(command)
        return subprocess.CompletedProcess(command, 3 if "pytest" in command[2:3] else 0)

    monkeypatch.setattr(try_environments.subprocess, "run", note)
    return found


def test_a_kept_environment_is_brought_up_to_date_and_not_made_again(commands, monkeypatch, tmp_path):
    (tmp_path / "newest/bin").mkdir(parents=True)
    (tmp_path / "newest/bin/python").touch()
    monkeypatch.setattr("sys.argv", ["try_environments", "newest", "--keep", str(tmp_path)])
    assert try_environments.main() == 3, "pytest's exit code"
    python = str(tmp_path / "newest/bin/python")
    assert [command[0] for command in commands] == [python] * 3
    assert "--upgrade" in commands[0] and commands[2][-2:] == ["tests/tuner", "tests/kernels"]


def test_an_unknown_environment_is_refused(monkeypatch, capsys, commands):
    monkeypatch.setattr("sys.argv", ["try_environments", "newst"])
    with pytest.raises(SystemExit):
        try_environments.main()
    assert "newst: no such environment; known: oldest, newest, tools" in capsys.readouterr().err and not commands
