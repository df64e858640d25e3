"""A few kills of the fault injection in tests/chaos; `make chaos` does all of it."""

import subprocess
import sys

from tests.support.places import ROOT


def test_a_study_survives_a_few_kills():
    command = [sys.executable, "-m", "tests.chaos", "--kills", "3", "--only", "kill"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
