"""A few kills of the fault injection in tests/chaos.py; `make chaos` does all of it."""

import subprocess
import sys

from conftest import ROOT


def test_a_study_survives_a_few_kills():
    command = [sys.executable, "tests/chaos.py", "--kills", "3", "--only", "kill"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
