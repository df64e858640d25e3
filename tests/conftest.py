"""Fixtures shared by all tests: run records go to a temporary folder; official data files are optional."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which the first room that is collected may do
# A shell's background jobs ignore Ctrl-C, those of nohup SIGHUP, and so would the runs that tests start and stop.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

gc.disable()  # what tests import stays, and searches for garbage among it would take a fifth of the suite's time

import pytest

pytest.register_assert_rewrite("tests.support")  # its assertions are as those of tests

from tests.support.places import DATA


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()
    if memory := sys.modules.get("accelerate.utils.memory"):
        # It searches for garbage before each training, in a tenth of the time that a test's few steps take.
        memory.gc = SimpleNamespace(collect=lambda: 0)


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def hydra() -> None:
    """No test meets the Hydra that an earlier one has set up; the method's own tests do without Hydra."""
    if core := sys.modules.get("hydra.core.global_hydra"):
        core.GlobalHydra.instance().clear()


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """No test meets variables that an earlier one's code has set, as launchers do for the processes they start."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() | before.keys():
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]


@pytest.fixture
def official_data() -> Path:
    """The folder of official GLUE files; the test is skipped where there is none (name one with DUAL_LORA_DATA)."""
    if not (DATA / "glue").is_dir():
        pytest.skip("official data files are not here; name their folder with DUAL_LORA_DATA")
    return DATA


@pytest.fixture
def own_data(tmp_path) -> Path:
    """A folder with tables of one's own, for classes and for instructions alike."""
    folder = tmp_path / "own"
    folder.mkdir()
    for split, numbers in (("train", range(24)), ("test", range(24, 36))):
        rows = [f'"{("a film", "soup, cold")[n % 2]}, number {n}",{n % 2},say {n},it is {n}' for n in numbers]
        (folder / f"{split}.csv").write_text("\n".join(["text,label,prompt,response", *rows, ""]))
    return folder


@pytest.fixture
def runs_folder(tmp_path, monkeypatch) -> Path:
    """Run records of this test alone, in this process and in those it starts."""
    from dual_lora.lab.config import paths

    folder = tmp_path / "runs"
    monkeypatch.setattr(paths, "RUNS", folder)
    monkeypatch.setenv("DUAL_LORA_RUNS", str(folder))
    return folder
