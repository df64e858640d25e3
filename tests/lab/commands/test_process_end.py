"""A command ends without Python's teardown, and nothing that it still had to do is lost."""

import os
import subprocess
import sys

import pytest

from dual_lora.lab.errors import EXIT_STOPPED
from tests.support.places import ROOT

SCRIPT = """
import atexit, ctypes, logging, os, sys, tempfile, threading, time
from pathlib import Path
from dual_lora.lab.commands.guard import run_command

folder, code = Path(sys.argv[1]), int(sys.argv[2])


class Teardown:
    def __del__(self):
        os.write(2, b"freed")  # by Python's teardown, the last thing it does


class Kept(logging.Handler):
    def flush(self):
        (folder / "logged").touch()


kept, logger = Teardown(), Kept()
made = tempfile.TemporaryDirectory(dir=folder)
atexit.register(lambda: print("printed by atexit"))


def finish_late():
    time.sleep(0.5)
    (folder / "thread").write_text("done")


def main():
    threading.Thread(target=finish_late).start()
    (folder / "made").write_text(made.name)
    print("printed by Python")
    ctypes.pythonapi.printf(b"printed by C\\n")
    if code == 3:
        raise ValueError("odd")
    return code


run_command(main)
"""


def start(folder, *words: str) -> subprocess.CompletedProcess:
    """Run Python on these words with its output in a pipe, where nothing is flushed line by line."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "DUAL_LORA_LAZY": "1"}
    env.pop("PYTHONUNBUFFERED", None)
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture
def script(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return str(file)


@pytest.mark.parametrize("code", [0, 2])
def test_what_is_left_to_do_is_done_and_the_teardown_is_not(code, script, tmp_path):
    done = start(tmp_path, script, str(tmp_path), str(code))
    assert (done.returncode, done.stderr) == (code, "")
    assert sorted(done.stdout.splitlines()) == ["printed by C", "printed by Python", "printed by atexit"]
    assert (tmp_path / "thread").read_text() == "done" and (tmp_path / "logged").exists()
    assert not os.path.exists((tmp_path / "made").read_text())


def test_an_error_of_the_program_keeps_its_exit_code(script, tmp_path):
    done = start(tmp_path, script, str(tmp_path), "3")
    assert done.returncode == 1 and "ValueError: odd" in done.stderr and "freed" not in done.stderr
    assert "printed by atexit" in done.stdout and (tmp_path / "thread").exists()


@pytest.mark.parametrize("stdout", [">&-", ">/dev/full"])
def test_output_that_nobody_takes_changes_no_exit_code(stdout, script, tmp_path):
    shell = f"{sys.executable} {script} {tmp_path} 2 {stdout}"
    done = start(tmp_path, "-c", f"import os; os._exit(os.system({shell!r}) >> 8)")
    assert done.returncode == 2 and "Traceback" not in done.stderr and (tmp_path / "thread").exists()


RUN_PATH = """import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("after it")
"""
WRAPPERS = {"profiler": ["-m", "cProfile"], "runpy": ["-c", RUN_PATH]}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_who_runs_the_script_goes_on_after_it(wrapper, script, tmp_path):
    done = start(tmp_path, *WRAPPERS[wrapper], script, str(tmp_path), "0")
    assert done.returncode == 0 and ("function calls" in done.stdout or "after it" in done.stdout)
    assert "freed" in done.stderr


# Ctrl-C right after a command was started, while it still imports what answers Ctrl-C.


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
