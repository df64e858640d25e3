"""A fixture of several rooms of the harness."""

import pytest


@pytest.fixture
def reference(tmp_path, monkeypatch):
    """A function that does a run without interruption in a folder of its own and returns what is `kept` of it."""
    from dual_lora.lab.config import paths
    from dual_lora.lab.record.run import Run
    from dual_lora.lab.train.run import train_run
    from tests.support.killed_runs import kept

    def reference(settings) -> dict:
        with monkeypatch.context() as patch:
            patch.setattr(paths, "RUNS", tmp_path / "reference")
            train_run(Run.prepare(settings))
            return kept(Run.prepare(settings).record.folder)

    return reference
