"""Run records: one folder a run, named by what the run is; `result.json`, written last and whole, means finished.

    runs/<study>/<identity>/
        config.yaml          every setting, resolved
        environment.json     versions, machine, code commit
        metrics.jsonl        one line a log step
        predictions.jsonl    one line an example: id, raw output, answer, gold
        adapter/ or model/   what was trained
        result.json          metrics, parameters, time, memory, identity

While a run is unfinished there are also `checkpoints/`, `.lock` (who does it), `trained.json` once training is done,
and `failure.json` if a try failed. A run with `force=true` is done in `.again/`, whose files take the old ones' places
when they are whole, so that no result is lost on the way.

The identity is a hash of the facts that can change a digit of the result (settings, task version, data and weights),
so the same facts find the same folder. Where the files are, and what is logged where, is not among them.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

import tasks
from dual_lora.lab import checkpoints, gguf_file, lock, processes
from dual_lora.lab.disk import flush, remove, writing
from dual_lora.lab.settings import Settings, UserError, first_line, place, require

ROOT = Path(__file__).resolve().parents[2]
RUNS = Path(os.path.expanduser(os.environ.get("DUAL_LORA_RUNS") or ROOT / "runs"))
BUNDLED = Path(__file__).parent / "bundled"
PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "datasets", "safetensors", "triton", "numpy")
PACKAGES += ("scikit-learn", "scipy", "sacrebleu", "pycocoevalcap", "hydra-core", "omegaconf", "bitsandbytes")
# Variables of the environment that change which kernels run or in which order numbers are added.
VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TRITON_INTERPRET",
)
VARIABLES += ("CUDA_LAUNCH_BLOCKING", "FLASH_ATTENTION_DETERMINISTIC")
VARIABLES += ("CUDA_VISIBLE_DEVICES", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "ATEN_CPU_CAPABILITY")
SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD)$", re.I)
# Bytes of either end of a weight file that identify it.
END = 1 << 20
# What of the repository can change a digit of a run, as git names paths.
CODE = ("dual_lora/", "tasks/", "conf/", ":(glob)*.py", "pyproject.toml")
# What its environment must tell.
MADE_WITH = ("commit", "uncommitted_changes", "threads")
# What of a try at a run that went on stays in its environment.
TRY = ("started", "commit", "uncommitted_changes", "code")
# What of a model's folder can change a digit.
MODEL_FILES = ("*.safetensors", "config.json", "generation_config.json", "tokenizer*", "vocab*", "merges.txt")
MODEL_FILES += ("special_tokens_map.json", "added_tokens.json", "*.model", "chat_template*")
# What a run's result must tell, whatever version wrote it.
RESULT = {"identity", "model", "task", "method", "seed", "metric", "metrics", "data"}
# method.lr is where train.lr has its value from, if it has no other.
NOT_IDENTITY = {
    "model": {"path", "architecture"},
    "task": {"train_rows"},
    "method": {"lr"},
    "train": {"save_steps", "save_minutes", "log_steps"},
    "eval": {"before"},
}


# What a finished run leaves, sealed by the SHA-256 in its result.
LEFT = ("config.yaml", "environment.json", "metrics.jsonl", "predictions.jsonl", "adapter", "model")
AGAIN, TRAINED = ".again", "trained.json"
# What of a finished run does not hold for the same run done again.
OUTDATED = ("checkpoints", TRAINED, "failure.json", "evaluation.json")
FIGURES = ("ranks", "stable_ranks", "histograms")  # of an analysis
OUTDATED += ("analysis.json", "analysis.csv", *(f"{name}.{kind}" for name in FIGURES for kind in ("png", "pdf")))


@contextmanager
def told() -> Iterator[None]:
    """Turn a task's error into the user's one line."""
    try:
        yield
    except tasks.TaskError as error:
        raise UserError(str(error)) from error


def task_of(settings: Settings) -> tasks.Task:
    """Return the task a run is about.

    Raises:
        UserError: its options are wrong.
    """
    with told():
        return tasks.load(settings.task.name, settings.task.options, settings.data_dir)


def model_path(settings: Settings) -> Path | None:
    """Return the folder or the GGUF file the model is read from, or None for the hub.

    Raises:
        UserError: `model.path` holds no model.
    """
    model = settings.model
    path = (
        BUNDLED / model.name if model.bundled and model.path is None else model.path and place("model.path", model.path)
    )
    if path and gguf_file.is_one(path):
        gguf_file.header(path)
        return path
    if path and not (path / "config.json").is_file():
        raise UserError(f"model.path={path}: no config.json there; give the folder of a saved Hugging Face model")
    if path and not list(path.glob("*.safetensors")):
        raise UserError(f"model.path={path}: no *.safetensors there; other weight formats are not loaded")
    if path:
        kind = read_object(path / "config.json", "save the model anew").get("model_type")
        require(isinstance(kind, str), f"{path / 'config.json'}: names no model_type; give a saved Hugging Face model")
    return path or None


def read_object(path: Path, mend: str, *keys: str) -> dict[str, Any]:
    """Return the object that a JSON file holds, with at least these keys.

    Raises:
        UserError: it holds something else; `mend` says what to do.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({first_line(error)}); {mend}") from error
    require(isinstance(content, dict), f"{path}: damaged (no JSON object); {mend}")
    lacking = [key for key in keys if key not in content]
    require(not lacking, f"{path}: damaged (no {', '.join(lacking)}); {mend}")
    return content


def model_facts(settings: Settings) -> dict[str, str]:
    """Return what identifies the weights: hub id and revision, or a hash over both ends of every weight file, of a GGUF
    file over all that stands before the weights, too."""
    folder = model_path(settings)
    if folder is None:
        known = settings.model.hub or settings.plan
        require(bool(known), f"model={settings.model.name}: not on the hub; give model.path=DIR, a saved model")
        here = os.path.isdir(settings.model.hub or "")
        require(not here, f"model.hub={settings.model.hub}: is a folder here; give it as model.path=DIR")
        return {"hub": f"{settings.model.hub}@{settings.model.revision}"}
    if gguf_file.is_one(folder):
        ends = file_ends(folder, gguf_file.header(folder).size + END)
        return {"sha256": hashlib.sha256(f"{folder.stat().st_size}".encode() + ends).hexdigest()}
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode() + file_ends(file, END))
    return {"sha256": digest.hexdigest()}


def file_ends(file: Path, first: int) -> bytes:
    """Return the `first` bytes of a file and its last `END`."""
    with file.open("rb") as stream:
        start = stream.read(first)
        stream.seek(max(0, file.stat().st_size - END))
        return start + stream.read()


def model_files(settings: Settings) -> dict[str, str]:
    """Return the SHA-256 of every file of the model's folder that can change a digit; of a model of the hub none, which
    is known by its revision. The run's name holds less of them, so that it does not change from version to version."""
    path = model_path(settings)
    if path is None:
        return {}
    found = {"gguf": path}  # whatever the file is called
    if path.is_dir():
        found = {file.name: file for pattern in MODEL_FILES for file in path.glob(pattern) if file.is_file()}
    return {name: unchanged_sha256(found[name], *stamp(found[name])) for name in sorted(found)}


def stamp(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file does."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


@cache
def unchanged_sha256(path: Path, *stamp: int) -> str:
    """Return a file's SHA-256, read once for each stamp."""
    return checkpoints.sha256(path)


def init_file(settings: Settings) -> Path:
    """Return the weights file of the run `init_from` names.

    Raises:
        UserError: there is none, or another method or model trained it.
    """
    folder = place("init_from", settings.init_from)
    file = folder / ("adapter/adapter_model.safetensors" if settings.method.peft else "model/model.safetensors")
    if not (folder / "result.json").is_file() or not file.is_file():
        raise UserError(f"init_from={folder}: no finished run with {file.name}; give the folder of one, runs/STUDY/ID")
    result = Record(folder).result()
    for part, mine in (("method", settings.method.name), ("model", settings.model.name)):
        if result[part] != mine:
            raise UserError(f"init_from={folder}: trained with {part}={result[part]}, this run has {part}={mine}")
    Record(folder).check(file.parent.name)
    return file


def chosen(settings: Settings) -> dict[str, Any]:
    """Return the settings that can change a digit of the result. What is null or empty is left out, so that a setting
    added later does not rename the runs that were done without it."""
    values = asdict(settings)
    kept = {key: values[key] for key in ("model", "task", "method", "train", "eval", "seed", "deterministic")}
    where = settings.hardware
    kept["hardware"] = {"devices": where.devices, "sharding": where.sharding} if where.devices > 1 else {}
    kept["hardware"] |= {"base": where.base}
    kept["init_from"] = Path(settings.init_from).name if settings.init_from else None
    for group, keys in NOT_IDENTITY.items():
        kept[group] = {k: v for k, v in kept[group].items() if k not in keys}
    kept["train"]["group_by_length"] = settings.train.group_by_length or None
    kept["model"]["chat"] = settings.model.chat or None
    return given(kept)


def facts(settings: Settings) -> dict[str, Any]:
    """Return everything that can change a digit of the result: settings, task version, data and weights."""
    task = task_of(settings)
    if settings.data_dir:
        place("data_dir", settings.data_dir)
    with told():
        data = task.source(settings.data_dir)
    found = {**chosen(settings), "weights": model_facts(settings), "data": data, "task_version": task.version}
    return found | ({"init_weights": tasks.base.file_sha256(init_file(settings))} if settings.init_from else {})


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Return nested values without those that are null or empty."""
    kept = {key: given(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in kept.items() if value not in (None, {}, [])}


def identity(settings: Settings) -> str:
    """Return the run's name: what a reader wants to see, then ten hexadecimal digits over all facts."""
    text = json.dumps(facts(settings), sort_keys=True)
    names = (settings.model.name, settings.task.name.replace("/", "-"), settings.method.name, f"s{settings.seed}")
    return "_".join(names) + "_" + hashlib.sha256(text.encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Record:
    """One run's folder."""

    folder: Path

    @classmethod
    def of(cls, settings: Settings) -> "Record":
        """Return the record of a run.

        Raises:
            UserError: the run cannot be named, nothing can be written where it belongs, or other files of the model
                made what is there.
        """
        found = cls(RUNS / settings.study / identity(settings))
        check_writable(found.folder)
        if not settings.force and not settings.plan:
            found.check_model(settings)
        return found

    @property
    def name(self) -> str:
        return (self.folder.parent if self.folder.name == AGAIN else self.folder).name

    def tried(self, settings: Settings) -> "Record":
        """Return the record a run with these settings is done in: this one, or the one below it until that is whole."""
        return Record(self.folder / AGAIN) if settings.force else self

    def settle(self) -> None:
        """Put the files of a whole run below `.again` in place of the old ones, result.json last.

        A kill in the middle leaves the rest to the next call.
        """
        again = Record(self.folder / AGAIN)
        if not (again.folder / "result.json").is_file():
            return
        again.tidy()
        for name in OUTDATED:
            remove(self.folder / name)
        for path in sorted(again.folder.iterdir(), key=lambda path: path.name == "result.json"):
            if path.is_dir():
                remove(self.folder / path.name)
            path.replace(self.folder / path.name)
        again.folder.rmdir()

    def clean(self) -> None:
        """Do what a kill right after the result left undone, unless another process is at it."""
        whole = [path for path in (self.folder, self.folder / AGAIN) if (path / "result.json").is_file()]
        left = (AGAIN, TRAINED, "checkpoints", lock.NAME)
        if whole and any((self.folder / name).exists() for name in left):
            with suppress(lock.Elsewhere), lock.held(self.folder), writing(self.folder):
                self.settle()
                self.tidy()

    def tidy(self) -> None:
        """Remove what a finished run needs no more."""
        for path in (self.folder / "checkpoints", self.folder / TRAINED, *self.folder.glob(".*.partial")):
            remove(path)

    def shown(self) -> str:
        """Return the folder as a user would type it."""
        return os.path.relpath(self.folder) if self.folder.is_relative_to(Path.cwd()) else str(self.folder)

    def result(self) -> dict[str, Any] | None:
        """Return the finished run's result, or None while there is none."""
        if not (self.folder / "result.json").is_file():
            return None
        found = self.read("result.json", *sorted(RESULT))
        rest = {name: value for name, value in found.items() if name != "digest"}
        whole = found.get("digest") in (None, checkpoints.digest(rest))  # earlier versions wrote none
        require(whole, f"{self.folder / 'result.json'}: not as the run left it; run its command again with force=true")
        return found

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write the result, with SHA-256 of what the run leaves and of the result itself, and return it."""
        left = [path for name in LEFT for path in (self.folder / name, *checkpoints.files_of(self.folder / name))]
        found = {str(p.relative_to(self.folder)): checkpoints.sha256(p) for p in left if p.is_file()}
        result = {**result, "sha256": {name: value for name, value in found.items() if not name.endswith(".md")}}
        result["digest"] = checkpoints.digest(result)
        self.write("result.json", result)
        return result

    def check(self, *names: str) -> None:
        """Hold files of a finished run (also all of a folder, or simply all) against the SHA-256 in its result; earlier
        versions wrote none.

        Raises:
            UserError: one is gone or not as the run left it.
        """
        kept = (self.result() or {}).get("sha256", {})
        for name in (name for name in kept if name.startswith(names or "")):
            path = self.folder / name
            same = path.is_file() and checkpoints.sha256(path) == kept[name]
            require(same, f"{path}: not as the run left it; run its command again with force=true")

    def check_model(self, settings: Settings) -> None:
        """Hold the model's files against those the run began with; earlier versions did not write them down.

        Raises:
            UserError: one is another.
        """
        known = self.made_with().get("model_files")
        known = known if isinstance(known, dict) else {}
        now = model_files(settings) if known else {}
        other = sorted(name for name in known | now if known.get(name) != now.get(name))
        require(
            not other,
            f"{self.folder}: begun with another {', '.join(other)} of model={settings.model.name}; give the folder as "
            "it was as model.path=DIR, or name another study=NAME",
        )

    def failure(self) -> dict[str, Any] | None:
        """Return why the newest try failed: `error` (its type) and `message`; None if it did not."""
        return self.read("failure.json", "error", "message") if (self.folder / "failure.json").is_file() else None

    def fail(self, error: BaseException) -> None:
        details = getattr(error, "details", {})
        self.write("failure.json", {"error": type(error).__name__, "message": without_secrets(str(error)), **details})

    def read(self, name: str, *keys: str) -> dict[str, Any]:
        """Return a JSON file of the record, which must hold these keys.

        Raises:
            UserError: it is missing or damaged.
        """
        path = self.folder / name
        require(path.is_file(), f"{path}: not there; is {self.folder} the folder of a finished run?")
        return read_object(path, "remove it and run the same command again", *keys)

    def start(self, settings: Settings) -> None:
        """Make the folder ready for a run: config and environment, and of an earlier try that was cut short its newest
        checkpoint, or what it trained, with the metrics logged up to there."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in ("failure.json", "predictions.jsonl", *(p.name for p in self.folder.glob(".*.partial"))):
                (self.folder / stale).unlink(missing_ok=True)
            checkpoint, trained = self.checkpoint(), self.trained()
        if trained:
            rows = trained["logged"]
        elif checkpoint:
            rows = Record(checkpoint).logged()
        else:
            rows = [row for row in self.logged() if row["step"] == 0]
        goes_on = bool(trained or checkpoint or rows)
        if goes_on:
            self.check_model(settings)
        self.write_lines("metrics.jsonl", rows)
        self.write("config.yaml", yaml.safe_dump(asdict(settings), sort_keys=False))
        now = environment() | {"model_files": model_files(settings)}
        self.write("environment.json", went_on(self.made_with(), now) if goes_on else now)

    def made_with(self) -> dict[str, Any]:
        """Return the machine and code of the run; nothing where that file is missing or damaged."""
        try:
            return self.read("environment.json", *MADE_WITH)
        except UserError:
            return {}

    def checkpoint(self) -> Path | None:
        """Return the newest whole checkpoint of an unfinished try."""
        return checkpoints.newest(self.folder / "checkpoints")

    def weights(self, settings: Settings) -> Path:
        """Return the folder of what was trained."""
        return self.folder / ("model" if settings.method.peft is None else "adapter")

    def trained(self) -> dict[str, Any] | None:
        """Return what is known of a training that is done, if the weights it left are whole."""
        if not (self.folder / TRAINED).is_file():
            return None
        for name in ("model", "adapter"):
            found = checkpoints.sealed(self.folder / name, self.folder / TRAINED)
            if found:
                return found
        remove(self.folder / TRAINED)
        return None

    def logged(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl; one that a kill cut short ends them."""
        path, rows = self.folder / "metrics.jsonl", []
        for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict) or "step" not in row:
                break
            rows.append(row)
        return rows

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, handed to the system when this returns."""
        with writing(self.folder / "metrics.jsonl"), (self.folder / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def write_lines(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        self.write(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def write(self, name: str, content: Any) -> None:
        """Write a file whole or not at all: to a temporary name first, then renamed."""
        text = content if isinstance(content, str) else json.dumps(content, indent=1, allow_nan=False) + "\n"
        partial = self.folder / f".{name}.partial"
        with writing(self.folder / name):
            try:
                with partial.open("w", encoding="utf-8") as stream:
                    stream.write(text)
                    stream.flush()
                    os.fsync(stream.fileno())
                partial.replace(self.folder / name)
                flush(self.folder)
            except OSError:
                partial.unlink(missing_ok=True)
                raise


ELSEWHERE = "set DUAL_LORA_RUNS=DIR to keep runs elsewhere"


def check_writable(folder: Path, mend: str = ELSEWHERE) -> None:
    """Refuse a folder that cannot be written, or made, before anything is computed for it."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    able = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    require(able, f"{folder}: {there} is no folder that can be written; {mend}")


def without_secrets(text: str) -> str:
    """Return a text without the keys and passwords that the environment holds."""
    secret = {v for k, v in os.environ.items() if SECRET.search(k) and len(v) >= 8 and not v.startswith(("/", "~"))}
    for value in sorted(secret, key=len, reverse=True):
        text = text.replace(value, "***")
    return text


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git(*args: str) -> str | None:
    """Return what git says of this repository; None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def uncommitted_changes() -> bool | None:
    """Return whether code or settings are not those of the commit, new files included; None where git does not tell."""
    said = git("status", "--porcelain", "--untracked-files=all", "--", *CODE)
    return None if said is None else bool(said)


def went_on(begun: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the environment of a run that goes on: today's, with the commits of its earlier tries, and clean only if
    all of them were."""
    earlier = [*begun.get("earlier_commits", []), begun.get("commit")]
    doubts = [begun.get("uncommitted_changes"), now["uncommitted_changes"]]
    found = {"uncommitted_changes": True if True in doubts else None if None in doubts else False}
    found["earlier_tries"] = [*begun.get("earlier_tries", []), {name: begun.get(name) for name in TRY}]
    found["earlier_commits"] = [c for c in dict.fromkeys(earlier) if c != now["commit"]]
    return now | found | {"started": begun.get("started", now["started"])}


@cache
def code() -> str:
    """Return a SHA-256 over the code and the values this process began with."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("dual_lora/**/*.py"), *ROOT.glob("tasks/**/*.py"), *ROOT.glob("conf/**/*.yaml")]):
        digest.update(f"{path.relative_to(ROOT)} {checkpoints.sha256(path)}\n".encode())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """Return what beside the facts can change a digit of a result: versions, machine, how it computes, code."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "packages": {p: installed(p) for p in PACKAGES},
        "platform": platform.platform(),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": "cuda" if cuda else "cpu",
        "accelerator": torch.cuda.get_device_name() if cuda else None,
        "devices": torch.cuda.device_count() if cuda else 1,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "processes": processes.number(),
        "threads": torch.get_num_threads(),
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        "deterministic": {
            "algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn": torch.backends.cudnn.deterministic,
            "benchmark": torch.backends.cudnn.benchmark,
        },
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": uncommitted_changes(),
        "code": code(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [without_secrets(word) for word in sys.argv],
    }


def processor() -> str:
    """Return the processor's name as Linux tells it, or Python's word for it elsewhere."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor()
