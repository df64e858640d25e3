"""Ctrl-C right after a command was started, while it still imports what answers Ctrl-C."""

import subprocess
import sys

import pytest

from dual_lora.lab.errors import EXIT_STOPPED
from tests.support.places import ROOT

# Python asks every finder before it imports a module; this one presses Ctrl-C at the one that answers it.
PRESS = """
import os, runpy, signal, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "dual_lora.lab.commands.guard":
            print("pressed", flush=True)
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder)
sys.argv = [sys.argv[1], "run=/nonexistent"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", ["train.py", "eval.py", "sweep.py"])
def test_ctrl_c_during_the_first_imports_is_one_line(script):
    done = subprocess.run([sys.executable, "-c", PRESS, script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "pressed\n"
    assert done.stderr == f"{script}: stopped by SIGINT; the same command resumes from here\n"
    assert done.returncode == EXIT_STOPPED
