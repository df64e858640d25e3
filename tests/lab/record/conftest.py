"""A finished run."""

import shutil
from pathlib import Path

import pytest

from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.run import train_run
from tests.support.finished_runs import RUN


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a study with one finished run, to be copied."""
    before, paths.RUNS = paths.RUNS, tmp_path_factory.mktemp("finished")
    try:
        train_run(Run.prepare(load_settings(RUN)))
        return paths.RUNS / "adhoc"
    finally:
        paths.RUNS = before


@pytest.fixture
def record(finished, runs_folder) -> Record:
    """A finished run of this test's own."""
    shutil.copytree(finished, runs_folder / "adhoc")
    return Run.prepare(load_settings(RUN)).record
