"""The entry points as a user starts them, without the ten seconds and more that a new process takes to import torch,
transformers and PEFT: in a fork of this process, which has imported them."""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from typing import IO

import torch
from hydra.core.global_hydra import GlobalHydra
from tqdm import tqdm

import dual_lora.lab.train.run  # noqa: F401 - what a fork need not import
from tests.support.places import ROOT

tqdm.monitor_interval = 0  # no thread that could hold a lock at a fork


def run(*argv: str, timeout: float = 1500) -> subprocess.CompletedProcess:
    """Do what `python ARGV` does in the project's folder and return its exit code, output and errors.

    Raises:
        subprocess.TimeoutExpired: it took longer than so many seconds, and was killed.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        child = os.fork()
        if not child:
            be(argv, out, err)
        until = time.monotonic() + timeout
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise subprocess.TimeoutExpired(argv, timeout)
            time.sleep(0.02)
        said = [stream.seek(0) or stream.read() for stream in (out, err)]
        return subprocess.CompletedProcess(argv, os.waitstatus_to_exitcode(ended[1]), *said)


def be(argv: tuple[str, ...], out: IO, err: IO) -> None:
    """Run a script in this process and end it."""
    code = 1
    try:
        for number, stream in enumerate((out, err), start=1):
            os.dup2(stream.fileno(), number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, errors="replace", closefd=False) for n in (1, 2))
        os.chdir(ROOT)
        GlobalHydra.instance().clear()  # set up by an earlier test, perhaps
        torch.set_num_threads(1)  # a fork has lost all threads but one
        sys.argv = list(argv)
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
