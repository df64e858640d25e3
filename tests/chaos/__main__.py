"""Fault injection: a small study is killed, starved and damaged in many places, and must end as if nothing had been.

    python -m tests.chaos [--seed 0] [--kills 60] [--only KIND ...]

The study is `sweep.py` with three tiny runs. One process imports everything and forks a worker for every try, so that a
try costs a second instead of fifteen. Kills are SIGKILL from outside: at a random moment, or at a random point of those
where the worker opens, renames or removes one of the study's files, where it waits for its end. After every fault the
same command runs until it is done, and then every weight, metric, logged row, prediction and report table must have the
bytes of a run that was never disturbed. Prints a table; exits with 1 if a result was lost or differs.
"""

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # a fork loses every thread but one
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_ERROR_REPORTING": "false"}

import torch
from tabulate import tabulate

from dual_lora.lab.commands.guard import run_command
from dual_lora.lab.commands.sweep import sweep_command
from dual_lora.lab.config import paths
from dual_lora.lab.errors import EXIT_ELSEWHERE, EXIT_OK, EXIT_STOPPED, EXIT_USER
from dual_lora.lab.evaluate import evaluate
from dual_lora.lab.model import adapt
from dual_lora.lab.record.record import Record
from dual_lora.lab.report import write as report_write
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.train import run as train_run
from dual_lora.lab.train import trainer as train_trainer
from dual_lora.lab.train.trainer import RunTrainer
from tests.support.places import ROOT
from tests.support.wandb_stub import WandbStub

RUN = ["task=demo/sentiment", "eval.max_examples=8", "train.max_examples=40", "train.batch_size=8"]
RUN += ["train.max_steps=7", "train.log_steps=2", "method.dropout=0.1"]
SHORT = ["task.max_new_tokens=8"]
CELLS = {
    "last": ["model=tiny-roberta", "method=dual_lora"],
    "best": ["model=tiny-deberta", "method=dual_lora", "task.checkpoint=best"],
    "text": [
        "model=tiny-llama",
        "task=demo/restaurants",
        "method=dora",
        "train.accumulation=2",
        "task.max_new_tokens=8",
    ],
}
SPEC = {"title": "Chaos", "columns": "task.name", "rows": ["model.name"], "cells": CELLS}
SPEC |= {"full": {"seeds": [0], "run": RUN}}
COMMAND = ["experiment=chaos", "train.save_steps=2", "wandb.mode=disabled"]
TIMES = {"train_seconds", "tokens_per_second", "peak_memory_bytes", "sha256", "digest"}
LEFTOVERS = {"checkpoints", ".lock", "trained.json", "failure.json", ".again"}
PHASES = ("start", "load", "evaluate", "train", "checkpoint", "weights", "report")
# What is seen of `train.py -m` from outside, in the order in which it comes: files, and how many of them.
STATES = {
    "run begun": (".lock", 1),
    "first checkpoint": ("checkpoints/*/manifest.json", 1),
    "weights kept": ("trained.json", 1),
    "first result": ("result.json", 1),
    "second run begun": ("config.yaml", 2),
}
LIMIT = 600  # seconds a worker may take


@dataclass
class Row:
    """One line of the table."""

    fault: str
    tried: int = 0
    survived: int = 0
    lost: int = 0
    identical: int = 0
    compared: int = 0
    where: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        same = f"{self.identical} of {self.compared} studies identical"
        return f"{self.fault}: {self.survived} of {self.tried} survived, {self.lost} results lost, {same}"


class Study:
    """A folder of runs, the command that fills it, and what it must come to."""

    def __init__(self, folder: Path, command: list[str] = COMMAND) -> None:
        self.folder, self.command, self.log = folder, command, folder.with_suffix(".log")
        self.phase = mmap.mmap(-1, 1)

    def kept(self) -> dict[str, str]:
        """Return a hash of everything that must not depend on faults, by file."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name, data = str(path.relative_to(self.folder)), path.read_bytes() if path.is_file() else b""
            if path.name == "result.json":
                result = json.loads(data)
                data = json.dumps({k: v for k, v in result.items() if k not in TIMES}).encode()
            elif path.suffix != ".safetensors" and path.name not in ("metrics.jsonl", "predictions.jsonl", "table.csv"):
                continue
            found[name] = hashlib.sha256(data).hexdigest()
        return found

    def results(self) -> dict[str, bytes]:
        """Return the finished results' bytes."""
        return {str(p): p.read_bytes() for p in self.folder.glob("*/*/result.json")}

    def leftovers(self) -> set[str]:
        return {p.name for p in self.folder.glob("*/*/*") if p.name in LEFTOVERS or p.name.endswith(".partial")}

    def said(self) -> str:
        return self.log.read_text(errors="replace").replace("\r", "\n")

    def start(self, prepare: Callable[[], None] = lambda: None) -> int:
        """Fork a worker that runs the command; `prepare` is called in it first."""
        child = os.fork()
        if child:
            return child
        code = 99
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            paths.RUNS, sys.argv = self.folder, ["sweep.py", *self.command]
            self.tell_phases()
            prepare()
            run_command(sweep_command, self.command)
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def tell_phases(self) -> None:
        """Keep the phase of the work in memory that the parent sees."""
        places = [(adapt, "load_model"), (train_run, "evaluate_splits"), (RunTrainer, "fit_run")]
        places += [(RunTrainer, "_save_checkpoint"), (train_run, "seal_folder"), (report_write, "write_report")]
        for number, (place, function) in enumerate(places, start=1):
            setattr(place, function, self.within(number, getattr(place, function)))
        train_trainer.seal_folder = train_run.seal_folder

    def within(self, number: int, function: Callable) -> Callable:
        def call(*args, **kwargs):
            before, self.phase[0] = self.phase[0], number
            try:
                return function(*args, **kwargs)
            finally:
                self.phase[0] = before

        return call

    def finish(self, prepare: Callable[[], None] = lambda: None) -> int:
        """Run the command to its end and return its exit code."""
        return ended(self.start(prepare))


def ended(child: int, limit: float = LIMIT) -> int:
    """Return a child's exit code; one that takes too long is killed."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 98


def changed(folder: Path, event: str, args: tuple) -> str | None:
    """Return the kind of file below `folder` that an audit event changes, or None."""
    if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
        return None
    path = str(args[0]) if isinstance(args[0], str | os.PathLike) else ""
    if not path.startswith(f"{folder}/") or (event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)):
        return None
    if event == "os.remove" and not os.path.lexists(path):  # a run begins by removing what may be there
        return None
    kinds = ("checkpoints", "adapter", "report", "predictions", "result", ".lock", "metrics")
    return next((kind for kind in kinds if kind in path.removeprefix(str(folder))), "other")


def wait_for_the_end() -> None:
    time.sleep(LIMIT)


def wait_at(
    folder: Path, point: int, reached: int, kind: str | None = None, wait: Callable[[], object] = wait_for_the_end
) -> None:
    """In a worker: before change number `point` of a file below `folder`, of one kind or any, tell `reached` and wait.
    Point 0 is the worker's beginning."""
    left = point

    def hook(event: str, args: tuple) -> None:
        nonlocal left
        found = changed(folder, event, args)
        left -= found is not None and kind in (None, found)
        if not left:
            left = -1
            os.write(reached, b"x")
            wait()

    sys.addaudithook(hook)


def kinds(study: Study) -> list[str]:
    """Run the study once and return the kind of every change of a file."""
    inside, outside = os.pipe()

    def hook(event: str, args: tuple) -> None:
        if kind := changed(study.folder, event, args):
            os.write(outside, f"{kind}\n".encode())

    child = study.start(lambda: sys.addaudithook(hook))
    os.close(outside)
    with os.fdopen(inside) as stream:
        found = stream.read().split()
    assert ended(child) == 0, study.said()
    return found


def killed(study: Study, moment: float | None, point: int | None) -> str | None:
    """Start the study, kill it at a moment or a point and return its phase then; None if it ended before."""
    inside, outside = os.pipe()
    child = study.start(lambda: wait_at(study.folder, point, outside) if point else None)
    os.close(outside)
    ready, _, _ = select.select([inside], [], [], moment if moment is not None else LIMIT)
    told = bool(ready and os.read(inside, 1))  # b"" if the worker ended
    os.close(inside)
    os.kill(child, signal.SIGKILL)
    code = ended(child)
    if code != -signal.SIGKILL or (point and not told):
        return None
    return PHASES[study.phase[0]]


class Chaos:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw, self.rows = folder, random.Random(seed), []
        self.number = 0
        study = self.study()
        began = time.monotonic()
        self.points = kinds(study)
        self.seconds = time.monotonic() - began
        self.whole = study.kept()
        assert not study.leftovers(), study.leftovers()
        print(f"undisturbed: {self.seconds:.1f} s, {len(self.points)} changes of files, {dict(Counter(self.points))}")

    def study(self, command: list[str] = COMMAND) -> Study:
        self.number += 1
        folder = self.folder / str(self.number) / "runs"
        folder.mkdir(parents=True)
        return Study(folder, command)

    def row(self, fault: str) -> Row:
        self.rows.append(Row(fault))
        return self.rows[-1]

    def concluded(self, row: Row, study: Study, finished: dict[str, bytes] | None = None) -> bool:
        """Run the command to its end, compare, and count."""
        code = study.finish()
        row.lost += sum(study.results().get(name) != data for name, data in (finished or {}).items())
        kept, whole = study.kept(), self.whole
        equal = kept == whole and not study.leftovers()
        row.compared += 1
        row.identical += equal
        if code or not equal:
            other = {k for k in whole.keys() | kept.keys() if kept.get(k) != whole.get(k)}
            print(f"{row.fault}: exit {code}, {study.folder}: {other} {study.leftovers()}\n{study.said()[-3000:]}")
        if equal:
            shutil.rmtree(study.folder.parent, ignore_errors=True)
        return code == 0 and equal

    def kill(self, count: int) -> None:
        """SIGKILL, two to five times in a row before the study may end."""
        row = self.row("SIGKILL")
        rare = [kind for kind in sorted(set(self.points)) if kind not in ("checkpoints", "other")]
        while row.tried < count:
            study, tries, finished = self.study(), self.draw.randint(2, 5), {}
            done = 0
            while done < tries and row.tried < count:
                point = moment = None
                if self.draw.random() < 0.5:
                    moment = self.draw.uniform(0.2, self.seconds)
                else:
                    kind = self.draw.choice([*rare, "checkpoints", "checkpoints", "other"])
                    point = self.draw.choice([i for i, k in enumerate(self.points, start=1) if k == kind])
                phase = killed(study, moment, point)
                if phase is None:
                    break
                done += 1
                row.tried += 1
                row.where[f"{kind} file" if point else phase] += 1
                row.lost += sum(study.results().get(name) != data for name, data in finished.items())
                finished = study.results()
            row.survived += done * self.concluded(row, study, finished)

    def terminate(self, count: int) -> None:
        """SIGTERM and SIGINT at random moments."""
        row = self.row("SIGTERM, SIGINT")
        while row.tried < count:
            study, done = self.study(), 0
            for _ in range(3):
                study.phase[0] = 0
                child = study.start()
                time.sleep(self.draw.uniform(0.3, self.seconds))
                os.kill(child, self.draw.choice([signal.SIGTERM, signal.SIGINT]))
                phase, code = PHASES[study.phase[0]], ended(child, 60)
                if code != EXIT_STOPPED:
                    if code != EXIT_OK:
                        print(f"stop in {phase}: exit {code}\n{study.said()[-3000:]}")
                        row.tried += 1
                    break
                done += 1
                row.tried += 1
                row.where[phase] += 1
            row.survived += done * self.concluded(row, study)

    def full(self, sizes: list[int]) -> None:
        """A disk that is full, first read-only, then with room: an own small file system, or a limit on files."""
        row = self.row("disk full")
        for size in sizes:
            study = self.study()
            with small_disk(study.folder, size) as (limit, enlarge):
                code = study.finish(limit)
                row.tried += 1
                row.where[f"{size >> 10} KiB"] += 1
                told = code == EXIT_USER and "cannot be written" in study.said() and "Traceback" not in study.said()
                if not told:
                    print(f"disk of {size >> 10} KiB: exit {code}\n{study.said()[-3000:]}")
                finished = study.results()
                enlarge()
                row.survived += told and self.concluded(row, study, finished)

    def read_only(self) -> None:
        """At the start, and twice where a run is about to take its lock: the system refuses while a lock is open."""
        row = self.row("read-only folder")
        study = self.study()
        if not mounted(study.folder, 64 << 20):
            return
        for when, changes_of_locks in (("start", 0), ("between runs", 3), ("between runs", 3)):
            row.tried += 1
            row.where[when] += 1
            code, finished = self.without_writing(study, changes_of_locks)
            named = "cannot be written" in study.said() or "not a writable folder" in study.said()
            told = code == EXIT_USER and named and "Traceback" not in study.said()
            if not told:
                print(f"read-only, {when}: exit {code}\n{study.said()[-3000:]}")
            subprocess.run(["mount", "-o", "remount,rw", study.folder], check=True)
            row.lost += sum(study.results().get(name) != data for name, data in finished.items())
            row.survived += told
        row.survived -= not self.concluded(row, study)
        subprocess.run(["umount", study.folder], check=True)

    def without_writing(self, study: Study, changes_of_locks: int) -> tuple[int, dict[str, bytes]]:
        """Run the study and make its folder read-only before so many changes of locks: 3 is where the second is made,
        after the first was made and removed. Return the exit code and the results that had been finished."""
        (reached, tell), (told, go) = os.pipe(), os.pipe()
        child = study.start(lambda: wait_at(study.folder, changes_of_locks, tell, ".lock", lambda: os.read(told, 1)))
        os.close(tell)
        os.read(reached, 1)  # b"" if the worker ended before
        finished = study.results()
        subprocess.run(["mount", "-o", "remount,ro", study.folder], check=True)
        os.write(go, b"x")
        for number in (reached, told, go):
            os.close(number)
        return ended(child), finished

    def damage(self) -> None:
        """Files of a run that was cut short, overwritten, cut or removed; the newest are the likeliest to be hit."""
        row = self.row("damaged files of unfinished runs")
        patterns = ["checkpoints/*/*.safetensors", "checkpoints/*/schedule.json", "checkpoints/*/random_0.json"]
        patterns += ["checkpoints/*/trainer_state.json", "checkpoints/*/run.json", "checkpoints/*/manifest.json"]
        patterns += ["metrics.jsonl", "config.yaml", "environment.json", ".lock", "trained.json"]
        patterns += ["adapter/*.safetensors", "predictions.jsonl"]
        for pattern in patterns:
            late = pattern.startswith(("trained", "adapter", "predictions"))
            study = self.study()
            hits = [i for i, kind in enumerate(self.points, start=1) if kind == ("result" if late else "adapter")]
            killed(study, None, self.draw.choice(hits) if late else hits[0])
            damaged, told = [], True
            for folder in study.folder.glob("chaos/*"):
                found = sorted(folder.glob(pattern))
                if found and not (folder / "result.json").is_file():
                    damaged.append(folder)
                    spoil(found[-1], self.draw)
            if damaged and pattern == "environment.json":  # which model began the run is unknown: refused, as it says
                code = study.finish()
                told = code == EXIT_USER and "Traceback" not in study.said()
                for folder in damaged:
                    told = told and f"{folder}/{pattern}: " in study.said()
                    shutil.rmtree(folder)
            row.tried += bool(damaged)
            row.where[pattern.rpartition("/")[2]] += bool(damaged)
            row.survived += self.concluded(row, study) and bool(damaged) and told
            if not damaged:
                print(f"damage: no {pattern} to damage")

    def damage_finished(self) -> None:
        """Files of a finished run: told in one line, and no other result suffers."""
        row = self.row("damaged files of finished runs")
        study = self.study()
        study.finish()
        files = ("result.json", "config.yaml", "metrics.jsonl", "adapter", "environment.json", "predictions.jsonl")
        for name in files:
            (folder, *_) = sorted(study.folder.glob("chaos/*/result.json"))
            path = folder.parent / name
            path = path / "adapter_model.safetensors" if path.is_dir() else path
            before = path.read_bytes()
            path.write_bytes(b"\0damaged")
            code = study.finish()
            row.tried += 1
            row.where[name] += 1
            told = code == EXIT_USER and "Traceback" not in study.said() and str(path) in study.said()
            if not told:
                print(f"damaged {name}: exit {code}\n{study.said()[-2000:]}")
            row.survived += told
            if name == "result.json":  # as its line says: removed, and the same command does the run again
                path.unlink()
                row.survived -= study.finish() != 0
                row.compared += 1
                row.identical += study.kept() == self.whole
            else:
                path.write_bytes(before)
        self.concluded(row, study)

    def flip(self, count: int) -> None:
        """One bit of trained.json, in every byte, must be noticed; then some whole studies with one."""
        row = self.row("one bit of trained.json")
        weights = [i for i, kind in enumerate(self.points, start=1) if kind == "result"]
        for number in range(count):
            study = self.study()
            killed(study, None, weights[0])  # where the first result was to be written
            (path, *_) = study.folder.glob("chaos/*/trained.json")
            record, data = Record(path.parent), path.read_bytes()
            sound = record.read_training()
            assert sound, "trained.json is not whole before any bit is flipped"
            for at in range(len(data)) if not number else ():
                path.write_bytes(flipped(data, at, self.draw))
                found = record.read_training()
                row.tried += 1
                row.survived += found in (None, sound)
            path.write_bytes(flipped(data, self.draw.randrange(len(data)), self.draw))
            row.tried += 1
            row.where["whole study"] += 1
            row.survived += self.concluded(row, study)

    def broken(self, fault: str, said: str, breaks: list[tuple[object, str, int, Callable]]) -> None:
        """A function of the worker goes wrong at its nth call: told in one line, and the same command does the rest."""
        row = self.row(fault)
        for place, name, number, wrong in breaks:
            study = self.study()
            code = study.finish(lambda: at_call(place, name, number, wrong))  # noqa: B023 - called in this turn
            row.tried += 1
            row.where[name] += 1
            told = code == EXIT_USER and said in study.said() and "Traceback" not in study.said()
            if not told:
                print(f"{fault} at {name}: exit {code}\n{study.said()[-3000:]}")
            row.survived += told and self.concluded(row, study, study.results())

    def memory(self) -> None:
        calls = [
            (adapt, "load_model", 2),
            (adapt, "attach_method", 1),
            (train_trainer.Trainer, "training_step", 5),
        ]
        calls += [(evaluate, "compute_outputs", 2), (train_run, "merge_adapter", 1)]
        self.broken("out of memory", "out of memory", [(*call, no_memory) for call in calls])
        row, study = self.row("out of memory for a batch that is scored"), self.study()
        code = study.finish(lambda: at_call(evaluate, "classify_rows", 2, no_memory))
        row.tried, row.where["classify"] = 1, 1
        row.survived += code == EXIT_OK and self.concluded(row, study)

    def numbers(self) -> None:
        steps = [(train_trainer.Trainer, "training_step", n, lambda loss, *args: loss * float("nan")) for n in (2, 5)]
        self.broken("a loss that is no number", "the loss is nan at step", steps)
        self.broken(
            "weights that are no numbers", "failed: ", [(RunTrainer, "fit_run", n, spoil_weights) for n in (1, 3)]
        )

    def together(self, count: int) -> None:
        """The same command several times at once."""
        row = self.row("started three times at once")
        for _ in range(count):
            study, logs = self.study(), []
            children = []
            for number in range(3):
                study.log = study.folder.with_suffix(f".{number}.log")
                logs.append(study.log)
                children.append(study.start())
            codes = [ended(child) for child in children]
            row.tried += 1
            said = [log.read_text(errors="replace") for log in logs]
            clean = set(codes) <= {EXIT_OK, EXIT_ELSEWHERE} and not any("Traceback" in s for s in said)
            if not clean:
                print(f"together: exit codes {codes}\n" + "\n".join(s[-1500:] for s in said))
            row.where.update(f"exit {code}" for code in codes)
            row.survived += clean and self.concluded(row, study, study.results())

    def mirror(self) -> None:
        """The W&B server dies under a run."""
        row = self.row("W&B server dies")
        os.environ["WANDB_API_KEY"] = "0123456789abcdef" * 3
        for delay in (0.0, 1.0, 3.0):  # after the server was asked for something first
            study = self.study(COMMAND[:-1] + ["wandb.mode=online"])
            inside, outside = os.pipe()
            server = os.fork()
            if not server:
                with WandbStub() as stub:
                    os.write(outside, stub.url.encode())
                    while not stub.requests:
                        time.sleep(0.05)
                    os.write(outside, b"x")
                    time.sleep(LIMIT)
                os._exit(0)
            os.environ["WANDB_BASE_URL"] = os.read(inside, 99).decode()
            child = study.start()
            select.select([inside], [], [], LIMIT)
            time.sleep(delay)
            row.where[PHASES[study.phase[0]]] += 1
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)
            code = ended(child)
            row.tried += 1
            row.survived += code == 0
            row.compared += 1
            row.identical += study.kept() == self.whole
            if code or study.kept() != self.whole:
                print(f"W&B: exit {code}\n{study.said()[-3000:]}")

    def commands(self) -> None:
        """`train.py -m` as a user starts it, a process of its own, killed as soon as a state is seen, one after the
        other, and started again."""
        row = self.row("SIGKILL of train.py -m")
        folder = self.folder / "commands" / "runs"
        command = [sys.executable, "train.py", "-m", "study=chaos", *RUN, *COMMAND[1:], "method=dual_lora"]
        command += ["model=tiny-roberta,tiny-deberta"]
        env = {**os.environ, "DUAL_LORA_RUNS": str(folder)}
        for state, (pattern, number) in STATES.items():
            with tempfile.TemporaryFile() as log:
                started = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
                while started.poll() is None and len(list(folder.glob(f"chaos/*/{pattern}"))) < number:
                    time.sleep(0.002)
                started.kill()
                killed = started.wait() == -signal.SIGKILL
            row.tried += killed
            row.where[state] += killed
            if not killed:
                print(f"train.py -m ended with {started.returncode} before it was seen: {state}")
        finished = list(folder.glob("chaos/*/result.json"))
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        names = {name for name in self.whole if name.partition("/")[2].startswith("tiny-roberta_demo-sentiment_dual")}
        kept = Study(folder).kept()
        row.compared += 1
        row.identical += bool(names) and all(kept.get(name) == self.whole[name] for name in names)
        row.lost += sum(not path.is_file() for path in finished)
        row.survived = row.tried * (done.returncode == 0 and row.identical == 1)
        if not row.survived:
            print(done.stdout[-1000:], done.stderr[-3000:])

    def table(self) -> str:
        rows = [
            [r.fault, r.tried, r.survived, r.lost, f"{r.identical} of {r.compared}", shown(r.where)] for r in self.rows
        ]
        return tabulate(rows, headers=["fault", "tried", "survived", "results lost", "studies identical", "where"])

    def fine(self) -> bool:
        return all(r.tried == r.survived and not r.lost and r.identical == r.compared for r in self.rows)


def shown(counter: Counter) -> str:
    return ", ".join(f"{name} {n}" for name, n in sorted(counter.items()))


def flipped(data: bytes, at: int, draw: random.Random) -> bytes:
    """Return the bytes with one bit of one of them changed."""
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]


def at_call(place: object, name: str, number: int, wrong: Callable) -> None:
    """Have what a function returns at its nth call go through `wrong`, together with its arguments."""
    whole, left = getattr(place, name), number

    def call(*args, **kwargs):
        nonlocal left
        left -= 1
        found = whole(*args, **kwargs)
        return wrong(found, *args) if left == 0 else found

    setattr(place, name, call)


def no_memory(*args) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def spoil_weights(done: object, trainer: RunTrainer, *args) -> object:
    """Put a number that is none into the first trained weight, as a last step could."""
    weight = next(weight for weight in trainer.model.parameters() if weight.requires_grad)
    weight.data.view(-1)[0] = float("nan")
    return done


def spoil(path: Path, draw: random.Random) -> None:
    """Overwrite, cut short or empty a file."""
    data = bytearray(path.read_bytes())
    way = draw.choice(["flip", "cut", "noise"])
    if way == "flip" and data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif way == "cut":
        data = data[: len(data) // 2]
    else:
        data = bytearray(draw.randbytes(64))
    path.write_bytes(data)


def mounted(folder: Path, size: int) -> bool:
    """Put a small file system at a folder, if that is allowed here."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    return done.returncode == 0


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Give what a worker must call, and what makes room again; where nothing can be mounted, no file may grow large."""
    if mounted(folder, size):
        try:
            yield (
                lambda: None,
                lambda: subprocess.run(["mount", "-o", f"remount,size={256 << 20}", folder], check=True),
            )
        finally:
            subprocess.run(["umount", folder], check=False)
    else:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 4, resource.RLIM_INFINITY)), lambda: None


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--only", nargs="*")
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are told to ignore it
    Experiment.load = lambda name, scale=None: Experiment.from_content(name, SPEC, scale)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos") as folder:
        chaos = Chaos(Path(folder), given.seed)
        faults = {
            "kill": lambda: chaos.kill(given.kills),
            "terminate": lambda: chaos.terminate(12),
            "damage": chaos.damage,
            "damage_finished": chaos.damage_finished,
            "together": lambda: chaos.together(4),
            "full": lambda: chaos.full([16 << 10, 256 << 10, 700 << 10, 1500 << 10, 2500 << 10, 4 << 20]),
            "read_only": chaos.read_only,
            "mirror": chaos.mirror,
            "flip": lambda: chaos.flip(4),
            "memory": chaos.memory,
            "numbers": chaos.numbers,
            "commands": chaos.commands,
        }
        for name in given.only or faults:
            done = len(chaos.rows)
            faults[name]()
            print(f"{name}: {time.monotonic() - began:.0f} s; {'; '.join(map(str, chaos.rows[done:]))}", flush=True)
    print(f"\n{chaos.table()}\n\n{time.monotonic() - began:.0f} s, seed {given.seed}")
    return 0 if chaos.fine() else 1


if __name__ == "__main__":
    sys.exit(main())
