"""Bad input of every kind, through the entry points: one line that names the culprit, exit code 2, nothing lost.

tests/golden/bad_inputs.md is the table of them, with what is said; DUAL_LORA_GOLDEN=write pytest -m '' rewrites it.
How long an error takes is written there too, in classes, and not compared: of every case in this process, which has
loaded everything, and of one case or more of each kind as a user waits for it, from the start of a process to its end.
"""

import errno
import fcntl
import gzip
import io
import json
import os
import pickle
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.commands.guard import run_command
from dual_lora.lab.commands.sweep import sweep_command
from dual_lora.lab.commands.train import train_command
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.outside import hub as inputs_hub
from dual_lora.lab.config.outside.hub import is_hub_unreachable
from dual_lora.lab.config.paths import BUNDLED
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import EXIT_ELSEWHERE, EXIT_OK, EXIT_USER, UserError
from dual_lora.lab.inputs.splits import load_split
from dual_lora.lab.model.load import load_model
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.study.experiment import drop_replaced_overrides
from dual_lora.lab.train.run import train_run
from tests.support.gguf_files import write as write_gguf
from tests.support.official_files import (
    challenge_files,
    commonsense_files,
    dart_files,
    e2e_files,
    webnlg_files,
    write,
    write_official,
)
from tests.support.places import GOLDEN, ROOT

TABLE = GOLDEN / "bad_inputs.md"
SHORT = ["train.max_steps=2", "eval.max_examples=4", "eval.before=false", "wandb.mode=disabled"]
TINY = ["model=tiny-roberta", "task=demo/sentiment", *SHORT]
KEY = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Case:
    """What is wrong, the command line ({here} is the test's own folder), what the message must hold, `make`, which puts
    the bad thing there, and `under`, which has the machine fail. A case whose `script` is train.py adds to a short run
    on tiny-roberta."""

    kind: str
    what: str
    argv: str
    said: str
    make: Callable[[Path], None] = lambda here: None
    script: str = "train.py"
    env: dict[str, str] = field(default_factory=dict)
    under: Callable[[pytest.MonkeyPatch, Path], None] = lambda patch, here: None
    code: int = EXIT_USER

    def words(self, here: Path) -> list[str]:
        given = [word.replace("{here}", str(here)).replace("{_}", " ") for word in self.argv.split()]
        return drop_replaced_overrides([*TINY, *given]) if self.script == "train.py" else given


def changed(name: str, change: Callable[[bytes], bytes], base: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return what makes a good thing and then changes one file of it."""

    def make(here: Path) -> None:
        base(here)
        (here / name).write_bytes(change((here / name).read_bytes()))

    return make


def without(name: str, base: Callable[[Path], None]) -> Callable[[Path], None]:
    def make(here: Path) -> None:
        base(here)
        (here / name).unlink()

    return make


def in_json(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    """Return a change of a JSON file's content."""

    def changed(content: bytes) -> bytes:
        found = json.loads(content)
        return json.dumps(change(found) or found).encode()

    return changed


# Good things to spoil.


def rte(here: Path) -> None:
    write_official(here, "rte")


def model(here: Path) -> None:
    shutil.copytree(BUNDLED / "tiny-roberta", here / "model")


def finished(here: Path) -> None:
    """Copy the finished run; it is made once."""
    shutil.copytree(DONE["dual_lora"], here / "run")


def finished_full(here: Path) -> None:
    shutil.copytree(DONE["full"], here / "run")


def unfinished(here: Path) -> None:
    finished(here)
    (here / "run" / "result.json").unlink()


def own() -> Path:
    """Return the folder of the very run that the command asks for."""
    return Run.prepare(load_settings(TINY)).record.folder


def damaged_own_result(here: Path) -> None:
    shutil.copytree(DONE["dual_lora"], own())
    (own() / "result.json").write_text('{"metr')


def in_own(name: str, content: str) -> Callable[[Path], None]:
    """Return what makes a file in the folder of the very run that the command asks for."""
    return lambda here: write(name, content)(own())


def lock_of(host: str) -> str:
    return json.dumps({"pid": 1, "host": host, "since": "2026-01-01T00:00:00+00:00"})


def conf(name: str, content: str) -> Callable[[Path], None]:
    """Return what makes a copy of conf/ with one file of this content; `elsewhere` has it used."""

    def make(here: Path) -> None:
        shutil.copytree(paths.CONF, here / "conf")
        write(f"conf/{name}", content)(here)

    return make


# How the machine fails.


def elsewhere(patch: pytest.MonkeyPatch, here: Path) -> None:
    patch.setattr(paths, "CONF", here / "conf")


def failing(name: str, number: int, ways: str = "w") -> Callable[[pytest.MonkeyPatch, Path], None]:
    """Return what has every file whose path ends so, or for a temporary name (".NAME.") holds it, fail to open for
    reading ("r") or writing."""

    def fail(file) -> None:
        if str(file).endswith(name) or (name.endswith(".") and name in str(file)):
            raise OSError(number, os.strerror(number), str(file))

    def under(patch: pytest.MonkeyPatch, here: Path) -> None:
        real, real_low = io.open, os.open

        def opened(file, mode="r", *args, **kwargs):
            if mode[0] in ways:
                fail(file)
            return real(file, mode, *args, **kwargs)

        def opened_low(file, flags, *args, **kwargs):
            if "w" in ways and flags & (os.O_WRONLY | os.O_RDWR):
                fail(file)
            return real_low(file, flags, *args, **kwargs)

        patch.setattr("io.open", opened)
        patch.setattr("builtins.open", opened)
        patch.setattr("os.open", opened_low)

    return under


def raising(where: str, error: Exception) -> Callable[[pytest.MonkeyPatch, Path], None]:
    """Return what has a function fail."""

    def fail(*args, **kwargs):
        raise error

    return lambda patch, here: patch.setattr(where, fail)


def forbidden(patch: pytest.MonkeyPatch, here: Path) -> None:
    patch.setattr(os, "access", lambda path, mode: False)


def held_here(patch: pytest.MonkeyPatch, here: Path) -> None:
    """Have this process hold the lock; the system knows locks by the file as it was opened."""
    stream = (own() / ".lock").open("a+")
    fcntl.flock(stream, fcntl.LOCK_EX)
    patch.setattr(sys.modules[__name__], "HELD", stream)


def no_hub(patch: pytest.MonkeyPatch, here: Path) -> None:
    patch.setattr(inputs_hub.constants, "HF_HUB_OFFLINE", False)
    patch.setattr(inputs_hub.urllib.request, "getproxies", dict)
    patch.setattr(inputs_hub.constants, "ENDPOINT", "http://host:notaport")
    is_hub_unreachable.cache_clear()


HELD: io.TextIOBase | None = None
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
LOADING = "transformers.AutoModelForSequenceClassification.from_pretrained"
LONG = "a" * 300


def as_pickle(path: str, base: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return what replaces the weights of a good thing by a pickle, which would leave a trace if it were read."""

    def make(here: Path) -> None:
        base(here)
        file = here / path
        other = file.with_name("adapter_model.bin" if "adapter" in path else "pytorch_model.bin")
        other.write_bytes(pickle.dumps(Trap()))
        file.unlink()

    return make


def in_gguf(**options) -> Callable[[Path], None]:
    """Return what writes a GGUF file of the bundled llama model."""
    return lambda here: write_gguf(here / "x.gguf", **options)


READ = f"{tempfile.gettempdir()}/pickle-was-read-{os.getpid()}"


class Trap:
    """What a pickle could do when it is read."""

    def __reduce__(self):
        return os.mkdir, (READ,)


def other_shapes(here: Path) -> None:
    finished(here)
    file = here / "run/adapter/adapter_model.safetensors"
    save_file(
        {name: tensor[..., :1].contiguous() if tensor.ndim else tensor for name, tensor in load_file(file).items()},
        file,
    )


def own_code(here: Path) -> None:
    """Make a model that asks for code of its own repository."""
    change = in_json(lambda c: c | {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}})
    changed("model/config.json", change, model)(here)
    write("model/own.py", f"import os\nos.mkdir({str(here / 'code-was-run')!r})\n")(here)


ZIPPED = gzip.compress(b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n" * 50)
HEADER = "index\tsentence1\tsentence2\tlabel\n"
RTE, DEV = "task=glue/rte data_dir={here}", "glue/RTE/dev.tsv"
E2E = "model=tiny-llama task=e2e data_dir={here}"
OFFICIAL = f"{E2E} task.options.references=official"
COMMONSENSE = "model=tiny-llama task=commonsense data_dir={here}"
EVAL, SWEEP = "eval.py", "sweep.py"
PLACED = "model.path={here}/model"
GGUF = "model=tiny-llama model.path={here}/x.gguf"
CONFIG = "run/config.yaml"


def said(line: str) -> Callable[[bytes], bytes]:
    """Return a change of a YAML file: one more line, or another in the place of what begins alike."""
    key = line.partition(":")[0]
    return lambda content: re.sub(rf"(?m)^{key}:.*\n", "", content.decode()).encode() + f"{line}\n".encode()


CASES = [
    # config: names
    Case("config", "unknown setting", "train.epoch=2", "train.epoch: no such setting. Did you mean train.epochs?"),
    Case("config", "unknown choice", "method=lorra", "method=lorra: no such method. Did you mean lora?"),
    Case("config", "unknown setting with +", "+train.warmup=3", "train.warmup: no such setting"),
    Case("config", "a known setting with +", "+train.lr=1", "+train.lr: already exists"),
    Case("config", "a choice with +", "+method=lora", "+method: already exists"),
    Case("config", "no value at all", "rank", "rank: not of the form KEY=VALUE"),
    Case("config", "no name at all", "=3", "not of the form KEY=VALUE"),
    Case("config", "a text that a record would take for a setting", "model=tiny-llama task=demo/restaurants task.stop=['\\${seed}']", "task.stop.0=${seed}: a record would give it back as 0; give another value"),
    Case("config", "a text that a record could not hold", "model=tiny-llama task=demo/restaurants task.stop=['\\${b}']", "a record cannot hold these settings (task.stop[0]: Interpolation key 'b' not found)"),
    Case("config", "a line break", "study=a\\nb{_}c".replace("\\n", "{nl}"), "contains characters that are not text; remove them"),
    Case("config", "a removed group", "~method", "~method: settings cannot be removed"),
    Case("config", "an unknown option", "--config-name=x", "--config-name=x: no such option"),
    Case("config", "a folder of settings that is none", "--config-dir=/nowhere", "--config-dir /nowhere: no such folder"),
    Case("config", "code that is none", "plugins=/nowhere.py", "plugins=/nowhere.py: no such file"),
    Case("config", "a setting without its group", "lr=1e-3", "lr: no such setting. Did you mean train.lr?"),
    Case("config", "an option without its group", "held_out=0.2", "held_out: no such setting. Did you mean task.options.held_out?"),
    Case("config", "a model that is nowhere", "model=/nowhere", "model=/nowhere: no such folder; give a saved Hugging Face model"),
    Case("config", "a model of the hub without its owner", "model=bert-base-uncased", "Any other is model=ORG/NAME, of the hub, or model=DIR."),
    Case("config", "a new PEFT field without +", "method.peft.zzz=1", "write +method.peft.zzz=VALUE to add it"),
    Case("config", "another task's option", "+task.options.style=5", "demo/sentiment has no such option"),
    Case("config", "option of another type", "task=e2e task.options.separator=5 model=tiny-llama", "must be like ' ||'"),
    Case("config", "unknown task by name", "task.name=nothing", "task.name=nothing: no such task"),
    Case("config", "a module that is no task", "task.name=metrics", "task.name=metrics: not a task"),
    # config: values
    Case("config", "text for a number", "train.lr=fast", "train.lr=fast: must be a number"),
    Case("config", "fraction for a whole number", "method.rank=2.5", "method.rank=2.5: must be a whole number"),
    Case("config", "a list for a number", "train.lr=[1]", "train.lr=[1]: must be a number"),
    Case("config", "a number for a group", "train=5", "train: a group of settings; set one of them"),
    Case("config", "null where a value is needed", "train.epochs=null", "train.epochs: must be a number"),
    Case("config", "infinite", "method.alpha=inf", "method.alpha=inf: must be a finite number"),
    Case("config", "not a number", "train.lr=nan", "train.lr=nan: must be"),
    Case("config", "too large a seed", "seed=99999999999999999999", "must be below 2**32"),
    Case("config", "zero length", "task.max_length=0", "task.max_length=0: must be positive"),
    Case("config", "zero beams", "task.num_beams=0", "task.num_beams=0: must be positive"),
    Case("config", "dropout of everything", "method.dropout=1", "method.dropout=1.0: must be in [0, 1)"),
    Case("config", "ratio of all", "method.magnitude_ratio=1", "method.magnitude_ratio=1.0: must be in [0, 1)"),
    Case("config", "negative alpha", "method.alpha=-1", "method.alpha=-1.0: must be positive"),
    Case("config", "negative weight decay", "train.weight_decay=-1", "train.weight_decay=-1.0: must not be negative"),
    Case("config", "ranks of zero", "method.r1=0 method.r2=0", "method.r1=0 and method.r2=0: must be positive"),
    Case("config", "empty value", "data_dir=", "data_dir=: empty; give a value, or null"),
    Case("config", "nothing to adapt", "model.adapt=[]", "model.adapt=[]: nothing for dual_lora to adapt"),
    Case("config", "no regular expression", "model.roles.q='('", "model.roles.q=(: not a regular expression"),
    Case("config", "half of a fused weight", "model=tiny-gpt2 task=demo/choice model.split=[q,k]", "model.split=['q', 'k']: not the roles of one weight"),
    Case("config", "a beam search without beams", "model=tiny-llama task=demo/choice task.search=gpt2_beam", "only beam search uses it"),
    Case("config", "two ways to say the rank", "method.rank=8 method.r1=4 method.r2=12", "make it 16; drop one"),
    Case("config", "a rank without an adapter", "method=full method.rank=4", "method full has no adapter"),
    Case("config", "text from a model without", "task=demo/restaurants", "tiny-roberta writes no text"),
    Case("config", "a text of no tokens", "model=tiny-llama task=demo/choice task.max_new_tokens=0", "needs at least one token"),
    Case("config", "a chat without prompts", "model=tiny-llama model.chat=true", "model.chat=true: demo/sentiment has no prompts"),
    Case("config", "a chat without a template", "model=tiny-llama task=demo/restaurants model.chat=true", "tokenizer has no chat template"),
    Case("config", "classes smoothed that are none", "task=glue/stsb task.label_smoothing=0.1", "has no classes to smooth over"),
    Case("config", "several devices, one process", "hardware=ddp", "start it with torchrun --nproc-per-node 8 train.py"),
    Case("config", "a sharded classifier", "hardware=fsdp2 model=tiny-roberta task=demo/sentiment", "whose head trains"),
    Case("config", "checkpoints of all weights, sharded", "hardware=fsdp2 method=full train.save_steps=5", "drop it"),
    Case("config", "a 4-bit base that trains", "hardware=qlora method=full", "hardware.base=nf4: method full trains"),
    Case("config", "a 4-bit base from a GGUF file", "hardware=qlora model.path=x.gguf", "a GGUF file is read in full"),
    Case("config", "a 4-bit base, sharded", "hardware=fsdp2 hardware.base=nf4", "take hardware.sharding=replicas"),
    Case("config", "an unknown form of the base", "hardware.base=int8", "not one of nf4"),
    Case("config", "rank too small for two groups", "method.rank=1", "method.rank=1: dual_lora shares it between two groups"),
    Case("config", "unknown PEFT field", "+method.peft.lora_alfa=1", "Did you mean lora_alpha?"),
    Case("config", "PEFT field of another type", "+method.peft.bias=5 method=lora", "on model=tiny-roberta: 'int' object has no attribute"),
    Case("config", "PEFT field that is no pattern", "+method.peft.target_modules='('", "on model=tiny-roberta: missing )"),
    Case("config", "sweep without -m", "seed=0,1", "2 runs asked for: add -m"),
    # config: tricks
    Case("config", "a study above the runs", "study=../x", "study=../x: only letters"),
    Case("config", "a method's name above the runs", "method.name=../../x", "method.name=../../x: only letters"),
    Case("config", "a model's name above the runs", "model.name=../../x", "model.name=../../x: only letters"),
    Case("config", "a task's name above the runs", "task.name=../x", "task.name=..: only letters"),
    Case("config", "a name longer than a file's", f"study={'a' * 300}", "at most 60"),
    Case("config", "Hydra's folder", "hydra.run.dir=/etc", "hydra.run.dir: only hydra/launcher may be set"),
    Case("config", "Hydra's search path", "hydra.searchpath=[/tmp]", "hydra.searchpath: only hydra/launcher may be set"),
    Case("config", "Hydra's environment", "+hydra.job.env_set.X=1", "hydra.job.env_set.X: only hydra/launcher may be set"),
    Case("config", "code as a value", "+method.peft._target_=os.system", "_target_ names code to run"),
    Case("config", "code for Hydra", "hydra.launcher._target_=os.system", "_target_ names code to run"),
    Case("config", "an unknown launcher", "hydra/launcher=slrum", "no such launcher. Did you mean slurm?"),
    Case("config", "a launcher not installed", "hydra/launcher=ray_cluster", "not installed; pip install -e '.[ray]'"),
    Case("config", "a setting of another launcher", "hydra/launcher=slurm hydra.launcher.n_jobs=2", "launcher slurm has no such setting"),
    Case("config", "two launchers", "hydra/launcher=slurm,workstation", "hydra/launcher: one value for all runs"),
    Case("config", "the environment", "study=${oc.env:WANDB_API_KEY}", "study: ${...} may name only other settings"),
    Case("config", "the environment, hidden", "study=${oc.${wandb.mode}:X}", "not of the form KEY=VALUE"),
    Case("config", "decoded text", "study=${oc.decode:a}", "study: ${...} may name only other settings"),
    Case("config", "an unknown reference", "seed=${nothing}", "seed: Interpolation key 'nothing' not found"),
    Case("config", "a reference to itself", "seed=${seed}", "seed: Recursive interpolation"),
    Case("config", "a key typed as a name", f"study={KEY}/x", "study: contains a key or password from the environment", env={"WANDB_API_KEY": KEY}),
    Case("config", "an unknown experiment", "experiment=learning_rate", "Did you mean learning_rates?", script=SWEEP),
    # data
    Case("data", "no such folder", "task=glue/rte data_dir=/nowhere", "data_dir=/nowhere: no such folder"),
    Case("data", "a file missing", RTE, "no glue/RTE/dev.tsv", without(DEV, rte)),
    Case("data", "a folder in place of a file", RTE, "dev.tsv: cannot be read", lambda h: folder_for(DEV, rte, h)),
    Case("data", "an empty file", RTE, "dev.tsv: no rows", changed(DEV, lambda c: b"", rte)),
    Case("data", "header only", RTE, "dev.tsv: no rows", changed(DEV, lambda c: HEADER.encode(), rte)),
    Case("data", "other columns", RTE, "dev.tsv: no columns 'sentence1', 'sentence2' and 'label', only a, b;", changed(DEV, lambda c: b"a\tb\n1\t2\n", rte)),
    Case("data", "a short row", RTE, "line 4 has 2 fields, not 4", changed(DEV, lambda c: c + b"0\ta\n", rte)),
    Case("data", "binary junk", RTE, "dev.tsv: cannot be read", changed(DEV, lambda c: bytes(range(256)) * 9, rte)),
    Case("data", "UTF-16", RTE, "dev.tsv: cannot be read", changed(DEV, lambda c: c.decode().encode("utf-16"), rte)),
    Case("data", "Latin-1", RTE, "cannot be read", changed(DEV, lambda c: c + "9\té\té\tentailment\n".encode("latin1"), rte)),
    Case("data", "an unknown label", RTE, "dev.tsv: line 2: the label 'xment', not one of", changed(DEV, lambda c: c.replace(b"entail", b"x"), rte)),
    Case("data", "a pickle for a table", RTE, "dev.tsv: cannot be read", changed(DEV, lambda c: pickle.dumps(Trap()), rte)),
    Case("data", "a gz cut short", RTE, "dev.tsv.gz: cannot be read", lambda h: zipped(ZIPPED[:-20], h)),
    Case("data", "a gz with a byte changed", RTE, "dev.tsv.gz: cannot be read", lambda h: zipped(spoilt(ZIPPED), h)),
    Case("data", "a gz that is none", RTE, "dev.tsv.gz: cannot be read", lambda h: zipped(b"index", h)),
    Case(
        "data",
        "a score out of range",
        "task=glue/stsb data_dir={here}",
        "a score of 9, which is not in [0, 5]",
        changed("glue/STS-B/dev.tsv", lambda c: c.replace(b"5.000", b"9"), lambda h: write_official(h, "stsb")),
    ),
    Case(
        "data",
        "a label out of range",
        "task=glue/sst2 data_dir={here}",
        "the label '7', not one of 0, 1",
        changed("glue/SST-2/train.tsv", lambda c: c + b"x\t7\n", lambda h: write_official(h, "sst2")),
    ),
    Case("data", "a line without a bar", E2E, "test.txt: line 2 is not", changed("e2e/test.txt", lambda c: c + b"x\n", e2e_files)),
    Case("data", "an empty sentence", E2E, "test.txt: line 2 is not", changed("e2e/test.txt", lambda c: c + b"name : Elm|| \n", e2e_files)),
    Case("data", "an empty sentence of GLUE", "task=glue/sst2 data_dir={here}", "line 4: an empty text", changed("glue/SST-2/train.tsv", lambda c: c + b"\t1\n", lambda h: write_official(h, "sst2"))),
    Case("data", "empty questions, to a model without special tokens", "model=tiny-gpt2 task=glue/qqp data_dir={here}", "train-2 is empty", changed("glue/QQP/train.tsv", lambda c: c + b"8\t8\t8\t\t\t1\n", lambda h: write_official(h, "qqp"))),
    Case("data", "an empty text file", E2E, "train.txt: no rows", changed("e2e/train.txt", lambda c: b"", e2e_files)),
    Case(
        "data",
        "columns swapped",
        OFFICIAL,
        "trainset.csv: line 2: ",
        changed("e2e-dataset/trainset.csv", lambda c: c.replace(b"mr,ref", b"ref,mr"), challenge_files),
    ),
    Case(
        "data",
        "a field left out",
        OFFICIAL,
        "trainset.csv: line 3 has 1 fields, not 2",
        changed("e2e-dataset/trainset.csv", lambda c: c + b"name[Elm]\n", challenge_files),
    ),
    Case("data", "JSON cut short", COMMONSENSE, "not JSON", changed("dataset/piqa/test.json", lambda c: c[:-9], commonsense_files)),
    Case("data", "an object for a list", COMMONSENSE, "a list of LLM-Adapters' items", changed("dataset/piqa/test.json", lambda c: b'{"a": 1}', commonsense_files)),
    Case("data", "JSON nested without end", COMMONSENSE, "not JSON", changed("dataset/piqa/test.json", lambda c: b"[" * 100_000, commonsense_files)),
    Case("data", "half of a character", COMMONSENSE, "surrogates not allowed", changed("dataset/piqa/test.json", lambda c: c.replace(b"solution2", b"\\ud800solution2", 1), commonsense_files)),
    Case("data", "a number for a text", COMMONSENSE, "a list of LLM-Adapters' items", changed("dataset/piqa/test.json", in_json(lambda c: [c[0] | {"instruction": 5}]), commonsense_files)),
    Case("data", "an answer nobody offers", COMMONSENSE, "has the answer 'solution9'", changed("dataset/piqa/test.json", in_json(lambda c: [c[0] | {"answer": "solution9"}]), commonsense_files)),
    Case("data", "a null for an answer", COMMONSENSE, "has None", changed("ft-training_set/commonsense_170k.json", in_json(lambda c: [c[0] | {"answer": None}]), commonsense_files)),
    Case("data", "the same id twice", "model=tiny-llama task=webnlg data_dir={here}", "KeyError('2') where WebNLG 2017", changed("webnlg_challenge_2017/train.json", lambda c: c.replace(b'"2"', b'"1"'), webnlg_files)),
    Case("data", "a fact of two parts", "model=tiny-llama task=dart data_dir={here}", "where DART 1.1.1 was expected", changed("dart/dart-v1.1.1-full-train.json", lambda c: c.replace(b'"SERVES", ', b""), dart_files)),
    Case("data", "a number for a relation", "model=tiny-llama task=dart data_dir={here}", "where DART 1.1.1 was expected", changed("dart/dart-v1.1.1-full-train.json", lambda c: c.replace(b'"SERVES"', b"5"), dart_files)),
    Case("data", "a prompt that leaves no room for its output", "model=tiny-gpt2 task=demo/choice task.max_new_tokens=250", "tiny-gpt2 takes 256 tokens, and the prompt of"),
    # adapter
    Case("adapter", "weights damaged", "run={here}/run", "adapter: cannot be loaded", changed("run/adapter/adapter_model.safetensors", lambda c: c[:200], finished), EVAL),
    Case("adapter", "no weights", "run={here}/run", "no adapter_model.safetensors", without("run/adapter/adapter_model.safetensors", finished), EVAL),
    Case("adapter", "no adapter_config.json", "run={here}/run", "adapter: cannot be loaded", without("run/adapter/adapter_config.json", finished), EVAL),
    Case("adapter", "adapter_config.json of no method", "run={here}/run", "adapter: cannot be loaded", changed("run/adapter/adapter_config.json", in_json(lambda c: c | {"peft_type": "MAGIC"}), finished), EVAL),
    Case("adapter", "adapter_config.json is junk", "run={here}/run", "adapter: cannot be loaded", changed("run/adapter/adapter_config.json", lambda c: b"\x00\xff", finished), EVAL),
    Case("adapter", "other shapes", "run={here}/run", "size mismatch for", other_shapes, EVAL),
    Case("adapter", "a pickle of weights", "run={here}/run", "no adapter_model.safetensors", as_pickle("run/adapter/adapter_model.safetensors", finished), EVAL),
    Case("adapter", "a trained model as a pickle", "run={here}/run", "no model.safetensors", as_pickle("run/model/model.safetensors", finished_full), EVAL),
    Case("adapter", "a trained model damaged", "run={here}/run", "model: cannot be loaded", changed("run/model/model.safetensors", lambda c: c[:-5], finished_full), EVAL),
    Case("adapter", "start from no run", "init_from=/nowhere", "init_from=/nowhere: no finished run"),
    Case("adapter", "start from another model's", "model=tiny-deberta init_from={here}/run", "trained with model=tiny-roberta", finished),
    Case("adapter", "start from another method's", "method=lora init_from={here}/run", "trained with method=dual_lora", finished),
    Case("adapter", "start from other ranks", "method.rank=4 init_from={here}/run", "an adapter with r=16, this run's has 4; take method.rank=16", finished),
    Case("adapter", "start from damaged weights", "init_from={here}/run", "changed since the run", changed("run/adapter/adapter_model.safetensors", lambda c: c[:200], finished)),
    Case("adapter", "start from a pickle", "init_from={here}/run", "no finished run with adapter_model.safetensors", as_pickle("run/adapter/adapter_model.safetensors", finished)),
    # checkpoint and record
    Case("record", "no run named", "", "run=runs/STUDY/ID is needed", script=EVAL),
    Case("record", "a folder that is no run", "run={here}", "no config.yaml there", script=EVAL),
    Case("record", "a file for a folder", "run={here}/x", "no config.yaml there", write("x", ""), EVAL),
    Case("record", "not finished", "run={here}/run", "not finished (no result.json); run its command to the end first", unfinished, EVAL),
    Case("record", "not finished, to analyse", "run={here}/run analyse=true", "not finished", unfinished, EVAL),
    Case("record", "not finished, to export", "run={here}/run export={here}/out", "not finished", unfinished, EVAL),
    Case("record", "result.json cut short", "run={here}/run", "result.json: damaged", changed("run/result.json", lambda c: c[:40], finished), EVAL),
    Case("record", "result.json is a list", "run={here}/run", "result.json: damaged (not a JSON object)", changed("run/result.json", lambda c: b"[]", finished), EVAL),
    Case("record", "result.json of another program", "run={here}/run", "result.json: damaged (no data,", changed("run/result.json", lambda c: b"{}", finished), EVAL),
    Case("record", "its own result.json damaged", "", "result.json: damaged", damaged_own_result),
    Case("record", "config.yaml with a newer setting", "run={here}/run", "config.yaml: not settings that this version can read", changed(CONFIG, said("magic: 1"), finished), EVAL),
    Case("record", "config.yaml without a setting", "run={here}/run", "config.yaml: not settings that this version can read", changed(CONFIG, lambda c: b"seed: 0\n", finished), EVAL),
    Case("record", "config.yaml is a list", "run={here}/run", "config.yaml: not settings that this version can read", changed(CONFIG, lambda c: b"[1]\n", finished), EVAL),
    Case("record", "config.yaml is binary", "run={here}/run", "config.yaml: not settings that this version can read", changed(CONFIG, lambda c: b"\x80\x04", finished), EVAL),
    Case("record", "config.yaml with a Python object", "run={here}/run", "config.yaml: not settings that this version can read", changed(CONFIG, said("study: !!python/object/apply:os.system [exit]"), finished), EVAL),
    Case("record", "config.yaml with code", "run={here}/run", "_target_ names code to run", changed(CONFIG, said("study: {_target_: os.system}"), finished), EVAL),
    Case("record", "config.yaml with the environment", "run={here}/run", "${...} may name only other settings", changed(CONFIG, said("study: ${oc.env:WANDB_API_KEY}"), finished), EVAL),
    Case("record", "config.yaml above the runs", "run={here}/run", "study=../x: only letters", changed(CONFIG, said("study: ../x"), finished), EVAL),
    Case("record", "exported over something", "run={here}/run export={here}/run", "not empty; give a new folder", finished, EVAL),
    Case("record", "another setting for eval", "run={here}/run seed=1", "seed: no such setting of eval.py", finished, EVAL),
    Case("record", "compared with no run", "run={here}/run analyse=true against={here}", "against=", finished, EVAL),
    # environment
    Case("environment", "a file in place of the runs", "", "is not a writable folder", lambda h: (h / "runs").write_text("")),
    Case("environment", "a model's folder that is none", "model.path=/nowhere", "model.path=/nowhere: no config.json, no weights (*.safetensors)"),
    Case("environment", "a model without weights", PLACED, "no weights (*.safetensors) there; give the folder", without("model/model.safetensors", model)),
    Case("environment", "a model of *.bin only", PLACED, "and pytorch_model.bin is a pickle, which is never read", as_pickle("model/model.safetensors", model)),
    Case("environment", "config.json is junk", PLACED, "config.json: damaged", changed("model/config.json", lambda c: b"\x00\xff{", model)),
    Case("environment", "config.json is a list", PLACED, "config.json: damaged (not a JSON object)", changed("model/config.json", lambda c: b"[]", model)),
    Case("environment", "config.json names no model", PLACED, "names no model_type", changed("model/config.json", lambda c: b"{}", model)),
    Case("environment", "a model of an unknown kind", PLACED, "cannot load", changed("model/config.json", in_json(lambda c: c | {"model_type": "magic"}), model)),
    Case("environment", "a model with code of its own", PLACED, "it needs code of its own", own_code),
    Case("environment", "weights cut short", PLACED, "cannot load", changed("model/model.safetensors", lambda c: c[:-9], model)),
    Case("environment", "weights of a smaller model", PLACED, "its weights are missing", changed("model/config.json", in_json(lambda c: c | {"num_hidden_layers": 9}), model)),
    Case("environment", "weights of another width", PLACED, "the shapes of its weights", changed("model/config.json", in_json(lambda c: c | {"intermediate_size": 24}), model)),
    Case("environment", "no tokenizer", PLACED, "no tokenizer next to the model", lambda h: [without("model/tokenizer.json", model)(h), (h / "model/tokenizer_config.json").unlink()]),
    Case("environment", "a tokenizer that is junk", PLACED, "cannot load", changed("model/tokenizer.json", lambda c: b"{}", model)),
    Case("environment", "another model's tokenizer", PLACED, "model=tiny-roberta", lambda h: other_tokenizer(h)),
    Case("environment", "no such GGUF file", GGUF, "x.gguf: no such file"),
    Case("environment", "a folder that is called a GGUF file", GGUF, "x.gguf: no such file", lambda h: (h / "x.gguf").mkdir()),
    Case("environment", "a GGUF file that is none", GGUF, "x.gguf: not a GGUF file", lambda h: shutil.copy(BUNDLED / "tiny-llama/model.safetensors", h / "x.gguf")),
    Case("environment", "a GGUF file that is empty", GGUF, "x.gguf: not a GGUF file", write("x.gguf", "")),
    Case("environment", "a GGUF file that is a pickle", GGUF, "x.gguf: not a GGUF file", lambda h: write("x.gguf", pickle.dumps(Trap()))(h)),
    Case("environment", "a GGUF file cut short", GGUF, "x.gguf: damaged", changed("x.gguf", lambda c: c[: len(c) // 2], in_gguf())),
    Case("environment", "a GGUF file cut in its last weight", GGUF, "cannot load", changed("x.gguf", lambda c: c[:-5], in_gguf())),
    Case("environment", "a GGUF file of an old version", GGUF, "x.gguf: damaged (version 1", changed("x.gguf", lambda c: c.replace(b"GGUF\x03", b"GGUF\x01", 1), in_gguf())),
    Case("environment", "a GGUF file of another kind", GGUF, "transformers cannot read clip models from GGUF", in_gguf(architecture="clip")),
    Case("environment", "a GGUF file with an unknown tokenizer", GGUF, "its tokenizer splits texts (deepseek-llm) is not supported", in_gguf(cut="deepseek-llm")),
    Case("environment", "a GGUF file with stretched positions", GGUF, "its positions are scaled", in_gguf(more={"llama.rope.scaling.type": "yarn"})),
    Case("environment", "a GGUF file of another family than the model's", "model=tiny-gpt2 task=demo/choice model.path={here}/x.gguf", "not found in the base model", in_gguf()),
    Case("environment", "a GGUF file of an encoder and decoder", "model=tiny-llama task=demo/restaurants model.path={here}/x.gguf", "cannot load", in_gguf(architecture="t5")),
    Case("environment", "a chat template that is broken", "model=tiny-llama task=demo/restaurants model.chat=true model.path={here}/x.gguf", "chat template fails on a single prompt", in_gguf(template="{% for %}")),
    Case("environment", "a chat template that would run code", "model=tiny-llama task=demo/restaurants model.chat=true model.path={here}/x.gguf", "chat template fails on a single prompt", in_gguf(template="{{ ''.__class__.__mro__[1].__subclasses__() }}")),
    Case("environment", "a model that is not here, offline", "model=roberta-base", "cannot load FacebookAI/roberta-base"),
    Case("environment", "data that is not here, offline", "task=glue/rte", "cannot load its train split"),
    # names that no disk takes, and homes that nobody has
    Case("config", "a data_dir too long", f"task=glue/rte data_dir={LONG}", "cannot be read (File name too long)"),
    Case("config", "a model.path too long", f"model.path={LONG}", "cannot be read (File name too long)"),
    Case("config", "an init_from too long", f"init_from={LONG}", "cannot be read (File name too long)"),
    Case("config", "a run too long", f"run={LONG}", "cannot be read (File name too long)", script=EVAL),
    Case("config", "nobody's home", "task=glue/rte data_dir='~nosuchuser/d'", "Could not determine home directory"),
    Case("config", "a home without quotes", "task=glue/rte data_dir=~/d", "quote a value of other characters"),
    # numbers beyond every machine
    Case("config", "a length beyond numbers", f"task.max_length=1{'0' * 30}", "must be below 2**32"),
    Case("config", "a batch beyond numbers", f"train.batch_size=1{'0' * 30}", "must be below 2**32"),
    Case("config", "a number of 5000 digits", f"train.batch_size={'9' * 5000}", "not of the form KEY=VALUE"),
    Case("config", "a rate beyond numbers", "train.lr=1e300", "train.lr=1e+300: must be in [0, 1000000.0)"),
    Case("config", "epochs beyond numbers", "train.epochs=1e300", "train.epochs=1e+300: must be in"),
    Case("config", "a digit that is no number", "run={here}/run eval.batch_size=²", "must be a whole number above 0", finished, EVAL),
    Case("config", "a batch of 30 digits for eval", f"run={{here}}/run eval.batch_size=1{'0' * 30}", "must be a whole number above 0", finished, EVAL),
    Case("config", "a letter beyond ASCII", "study='İ'", "only letters, digits"),
    # what Hydra could be made to do
    Case("config", "Hydra runs a pickle", "--version --experimental-rerun x.pickle", "--experimental-rerun: no such option"),
    Case("config", "Hydra shows an unknown setting", "--cfg job nothing=1", "nothing: no such setting"),
    Case("config", "Hydra shows a wrong value", "--cfg job train.lr=fast", "train.lr=fast: must be a number"),
    Case("config", "the sweeper's own settings", "+hydra.sweeper.params={train.lr:1}", "hydra.sweeper.params: only hydra/launcher may be set"),
    # files of conf/
    Case("config", "a method that is no YAML", "method=lora", "method/lora.yaml: line ", conf("method/lora.yaml", "name: lora\npeft: {a: [1\n"), under=elsewhere),
    Case("config", "an experiment that is no YAML", "experiment=x", "experiment/x.yaml: line ", conf("experiment/x.yaml", "cells: {a: [1\n"), SWEEP, under=elsewhere),
    Case("config", "an experiment that is a list", "experiment=x", "conf/experiment/x.yaml: gives no scale", conf("experiment/x.yaml", "[1]\n"), SWEEP, under=elsewhere),
    Case("config", "an experiment without a scale", "experiment=x", "conf/experiment/x.yaml: gives no scale", conf("experiment/x.yaml", "title: x\n"), SWEEP, under=elsewhere),
    Case("config", "an experiment without anything", "experiment=x", "title, cells, columns: missing", conf("experiment/x.yaml", "full: {}\n"), SWEEP, under=elsewhere),
    Case("config", "an experiment with a number for seeds", "experiment=x", "seeds: '5' has the wrong form", conf("experiment/x.yaml", "full: {seeds: 5}\n"), SWEEP, under=elsewhere),
    # exports, before anything is loaded
    Case("record", "exported into a file", "run={here}/run export={here}/x", "x: a file; give a new folder", lambda h: [finished(h), write("x", "")(h)], EVAL),
    Case("environment", "a hub without an address", "model=roberta-base", "HF_ENDPOINT: not an address; unset it, or give one like https://huggingface.co", under=no_hub),
    # checkpoints
    Case("checkpoint", "one without a manifest", "train.save_steps=1", "checkpoint-1 is damaged or incomplete", in_own("checkpoints/checkpoint-1/optimizer.pt", "x"), code=0),
    Case("checkpoint", "a manifest that is junk", "train.save_steps=1", "checkpoint-1 is damaged or incomplete", in_own("checkpoints/checkpoint-1/manifest.json", "\0"), code=0),
    Case("checkpoint", "a manifest that is a list", "train.save_steps=1", "checkpoint-1 is damaged or incomplete", in_own("checkpoints/checkpoint-1/manifest.json", "[1]"), code=0),
    Case("checkpoint", "a manifest of files that are gone", "train.save_steps=1", "checkpoint-1 is damaged or incomplete", in_own("checkpoints/checkpoint-1/manifest.json", '{"files": {"a": {"size": 1}}}'), code=0),
    Case("checkpoint", "a file in place of checkpoints", "train.save_steps=1", "checkpoints: not a folder; remove it", in_own("checkpoints", "")),
    # disks
    Case("disk", "full under the settings", "", "config.yaml: cannot be written (No space left on device); free some space", under=failing(".config.yaml.", errno.ENOSPC)),
    Case("disk", "a quota under the environment", "", "environment.json: cannot be written (Disk quota exceeded); free some space", under=failing(".environment.json.", errno.EDQUOT)),
    Case("disk", "broken under predictions", "", "predictions.jsonl: cannot be written (Input/output error); check the disk", under=failing(".predictions.jsonl.", errno.EIO)),
    Case("disk", "full under a checkpoint", "train.save_steps=1", "checkpoint-1: cannot be written (No space left on device); free some space", under=raising("transformers.Trainer._save_checkpoint", FULL)),
    Case("disk", "full under the adapter", "", "cannot be written (No space left on device); free some space", under=raising("peft.PeftModel.save_pretrained", FULL)),
    Case("disk", "full under an export", "run={here}/run export={here}/out", "export=", finished, EVAL, under=raising("transformers.PreTrainedModel.save_pretrained", FULL)),
    Case("disk", "broken under the data", RTE, "dev.tsv: cannot be read (Input/output error", rte, under=failing("dev.tsv", errno.EIO, "r")),
    Case("disk", "too many open files", "run={here}/run", "Too many open files; allow more open files", finished, EVAL, under=raising("dual_lora.lab.evaluate.trained.load_task", OSError(errno.EMFILE, "Too many open files"))),
    # permissions
    Case("permission", "runs that may not be written", "", "is not a writable folder; set DUAL_LORA_RUNS=DIR", under=forbidden),
    Case("permission", "an export that may not be written", "run={here}/run export={here}/out", "is not a writable folder; give another folder as export=DIR", finished, EVAL, under=forbidden),
    Case("permission", "a record that may not be written", "", "config.yaml: cannot be written (Permission denied); check that you may read and write", under=failing(".config.yaml.", errno.EACCES)),
    Case("permission", "a disk that is read-only", "", "environment.json: cannot be written (Read-only file system); check that you may read and write", under=failing(".environment.json.", errno.EROFS)),
    Case("permission", "a lock that may not be written", "", ".lock: cannot be written (Permission denied); check that you may read and write", under=failing("/.lock", errno.EACCES)),
    Case("permission", "data that may not be read", RTE, "dev.tsv: cannot be read (Permission denied); check that you may read it", rte, under=failing("dev.tsv", errno.EACCES, "r")),
    Case("permission", "a model that may not be read", PLACED, "config.json: cannot be read (Permission denied); check that you may read", model, under=failing("model/config.json", errno.EACCES, "r")),
    Case("permission", "settings that may not be read", "run={here}/run", "config.yaml: not settings that", finished, EVAL, under=failing("run/config.yaml", errno.EACCES, "r")),
    Case("permission", "something else that may not be read", "run={here}/run", "HERE/x: Permission denied; check that you may read and write there", finished, EVAL, under=lambda patch, here: raising("dual_lora.lab.evaluate.trained.load_task", PermissionError(errno.EACCES, "Permission denied", f"{here}/x"))(patch, here)),
    # memory
    Case("memory", "too little to load", "", "a smaller model or model.dtype=bfloat16 takes less", under=raising(LOADING, CUDA)),
    Case("memory", "too little to load, without an accelerator", "", "can't allocate memory: you tried 9 bytes); a smaller model", under=raising(LOADING, CPU)),
    Case("memory", "the system's word for it", "", "out of memory ([Errno 12] Cannot allocate memory)", under=raising(LOADING, OSError(errno.ENOMEM, "Cannot allocate memory"))),
    Case("memory", "too little to adapt", "", "out of memory (CUDA out of memory.", under=raising("dual_lora.lab.model.adapt.attach_method", CUDA)),
    Case("memory", "too little to train", "train.batch_size=8", "train.batch_size=4 train.accumulation=2 takes less", under=raising("transformers.Trainer.training_step", CUBLAS)),
    Case("memory", "too little to evaluate one row", "eval.batch_size=8", "a smaller model or model.dtype=bfloat16 takes less", under=raising("dual_lora.lab.evaluate.evaluate.classify_rows", CUDA)),
    Case("memory", "too little to merge", "", "out of memory (CUDA out of memory.", under=raising("dual_lora.lab.train.run.merge_adapter", CUDA)),
    Case("memory", "too little to evaluate again", "run={here}/run eval.batch_size=6", "a smaller model or model.dtype=bfloat16 takes less", finished, EVAL, under=raising("dual_lora.lab.evaluate.evaluate.classify_rows", CUDA)),
    Case("memory", "too little to load again", "run={here}/run", "take a machine with more", finished, EVAL, under=raising(LOADING, CPU)),
    Case("memory", "too little to export", "run={here}/run export={here}/out", "take a machine with more", finished, EVAL, under=raising("dual_lora.lab.evaluate.export.compute_probe_logits", CUDA)),
    Case("memory", "too little to analyse", "run={here}/run analyse=true", "take a machine with more", finished, EVAL, under=raising("dual_lora.lab.weights.analyse.describe_update", MemoryError())),
    # locks
    Case("lock", "held by a process here", "", "skipped: ", in_own(".lock", lock_of(platform.node())), under=held_here, code=EXIT_ELSEWHERE),
    Case("lock", "held by another machine", "", "skipped: ", in_own(".lock", lock_of("another")), code=EXIT_ELSEWHERE),
    Case("lock", "a folder in place of a lock", "", ".lock: cannot be written (Is a directory)", in_own(".lock/x", "")),
    Case("environment", "a model that is nowhere", "model=whisper-tiny-gpt2 task=e2e", "not on the hub; give model.path=DIR"),
]  # fmt: skip


def folder_for(name: str, base: Callable[[Path], None], here: Path) -> None:
    without(name, base)(here)
    (here / name).mkdir()


def zipped(content: bytes, here: Path) -> None:
    without(DEV, rte)(here)
    (here / f"{DEV}.gz").write_bytes(content)


def spoilt(content: bytes) -> bytes:
    return content[:30] + bytes([content[30] ^ 255]) + content[31:]


def other_tokenizer(here: Path) -> None:
    """Give the model a tokenizer that knows more tokens than it has rows for."""
    model(here)
    file = here / "model/tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    shift = 10_000
    content["model"]["vocab"] = {word: number + shift for word, number in vocabulary.items()}
    file.write_text(json.dumps(content))


DONE: dict[str, Path] = {}
ROWS: dict[tuple[str, str], tuple[str, int, float]] = {}


@pytest.fixture(scope="module", autouse=True)
def done(tmp_path_factory):
    """Two finished runs, of an adapter and of a whole model."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RUNS", folder)
        for method in ("dual_lora", "full"):
            result = train_run(Run.prepare(load_settings([*TINY, f"method={method}"])))
            DONE[method] = folder / "adhoc" / result["identity"]


def entry(script: str, words: list[str]) -> int:
    """Do what a script does when it is started, and return its exit code."""
    command = {"train.py": train_command, EVAL: evaluate_command, SWEEP: sweep_command}[script]
    with pytest.raises(SystemExit) as end:
        run_command(command, words)
    return end.value.code


def shown(text: str, here: Path) -> str:
    """Return a message without what differs from machine to machine."""
    text = text.replace(str(here), "HERE").replace(os.path.relpath(here), "HERE")
    text = re.sub(r"(?m)^.*\d+/\d+ \[.*\n?", "", re.sub(r"(?m)^.*\r", "", text))  # progress
    text = re.sub(r"config.yaml: line \d+", "config.yaml: line N", text.replace(platform.node(), "HOST"))
    text = re.sub(r"(Known: |a model that does: |Known are ).*", r"\1...", text)  # choices come and go
    return re.sub(r"_s0_[0-9a-f]{10}", "_s0_ID", text.replace(str(ROOT), "ROOT")).strip()


def known() -> dict[tuple[str, str], tuple[str, str]]:
    """Return message and exit code of every row of the table."""
    lines = [re.split(r"(?<!\\) \| ", line.strip("| \n")) for line in TABLE.read_text().splitlines()[4:]]
    return {(kind, what): (message.strip("`"), code) for kind, what, message, code, *_ in lines}


WRITE = os.environ.get("DUAL_LORA_GOLDEN") == "write"


@pytest.mark.parametrize("case", CASES, ids=[f"{c.kind}: {c.what}" for c in CASES])
def test_one_line_and_exit_code_2(case, tmp_path, monkeypatch, capfd):
    for name, value in case.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    case.make(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    case.under(monkeypatch, tmp_path)
    words = [word.replace("{nl}", "\n") for word in case.words(tmp_path)]
    monkeypatch.setattr(sys, "argv", [case.script, *words])
    capfd.readouterr()
    started = time.perf_counter()
    code = entry(case.script, words)
    seconds = time.perf_counter() - started
    out = capfd.readouterr()
    monkeypatch.undo()
    message = the_line(case, code, out.err, out.out, tmp_path)
    assert case.said in message.replace(r"\|", "|"), out.err
    assert len(message.splitlines()) == 1 and "Traceback" not in out.err + out.out, out.err
    assert code == case.code
    assert code == EXIT_OK or {p: p.read_bytes() for p in before} == before
    assert not (tmp_path / "code-was-run").exists() and not Path(READ).exists()
    ROWS[case.kind, case.what] = (message, code, seconds)
    if not WRITE:
        assert known()[case.kind, case.what] == (message, str(code))


def the_line(case: Case, code: int, err: str, out: str, here: Path) -> str:
    """Return what is said, as the table holds it; a run that goes on in spite of a bad thing says that in its output."""
    text = err if code else next((line for line in out.splitlines() if case.said in line), out)
    return shown(text, here).replace("|", r"\|").replace("`", "'")


def took(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return next((f"< {limit} s" for limit in (1, 3, 10, 30, 60) if seconds < limit), "longer")


def table() -> str:
    """Return all cases as Markdown."""
    head = f"{len(CASES)} bad inputs, what is said of each and the exit code. Time: until it is said, in a process that has "
    head += "loaded everything; whole: from the command to its end, imports included, measured for some of each kind."
    lines = [head, "", "| kind | what is wrong | said | code | time | whole |", "|---|---|---|---:|---:|---:|"]
    for (kind, what), (message, code, seconds) in ROWS.items():
        lines.append(f"| {kind} | {what} | `{message}` | {code} | {took(seconds)} | {took(WHOLE.get(what))} |")
    return "\n".join(lines) + "\n"


OUTSIDE = [
    "a study above the runs",
    "a gz cut short",
    "weights damaged",
    "not finished",
    "a model with code of its own",
    "a file in place of checkpoints",
    "full under a checkpoint",
    "a record that may not be written",
    "too little to load",
    "held by another machine",
]
WHOLE: dict[str, float] = {}


def alone(what: str, here: Path) -> None:
    """Be the process of one case whose machine fails."""
    case = next(c for c in CASES if c.what == what)
    with pytest.MonkeyPatch.context() as patch:
        case.under(patch, here)
        sys.argv = [case.script, *case.words(here)]
        sys.exit(entry(case.script, case.words(here)))


@pytest.mark.parametrize("what", [*OUTSIDE[:2], *(pytest.param(what, marks=pytest.mark.slow) for what in OUTSIDE[2:])])
def test_as_the_user_sees_it(what, tmp_path, runs_folder):
    """One case of each kind in a process of its own says the same."""
    case = next(c for c in CASES if c.what == what)
    case.make(tmp_path)
    code = "import sys; sys.path.insert(0, '.')\nfrom dual_lora.lab.system.libraries import hide_foreign_warnings\n"
    code += "hide_foreign_warnings()  # as the programs do before they import anything that prints\n"
    code += f"import tests.lab.commands.test_bad_inputs as t; t.alone({what!r}, t.Path({str(tmp_path)!r}))"
    command = (
        [sys.executable, "-c", code]
        if case.under is not Case.under
        else [sys.executable, case.script, *case.words(tmp_path)]
    )
    started = time.perf_counter()
    env = os.environ | {"DUAL_LORA_LAZY": "1"}
    options = {"cwd": ROOT, "env": env, "timeout": 1500, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, capture_output=True, text=True, **options)
    WHOLE[what] = time.perf_counter() - started
    assert done.returncode == case.code, done.stderr
    said = the_line(case, done.returncode, done.stderr, done.stdout, tmp_path)
    assert said == (ROWS[case.kind, what][0] if WRITE else known()[case.kind, what][0])


def test_every_kind_is_seen_as_the_user_does():
    assert {case.kind for case in CASES} == {case.kind for case in CASES if case.what in OUTSIDE}


def test_the_table_is_that_of_the_cases():
    if WRITE:
        assert len(ROWS) == len(CASES)
        TABLE.write_text(table())
    assert list(known()) == [(case.kind, case.what) for case in CASES] and len(CASES) >= 60


def test_a_record_that_cannot_be_written_is_told(tmp_path, monkeypatch, capfd):
    """As on a read-only disk, where the scores are printed and only evaluation.json is missing."""

    def denied(self, name, content):
        raise OSError(errno.EROFS, "Read-only file system", str(self.folder / name))

    finished(tmp_path)
    monkeypatch.setattr(Record, "write_file", denied)
    monkeypatch.setattr(sys, "argv", [EVAL])
    assert entry(EVAL, [f"run={tmp_path / 'run'}"]) == EXIT_USER
    assert "evaluation.json: Read-only file system; check that you may read and write there" in capfd.readouterr().err


def test_a_hub_that_refuses_is_not_asked_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(inputs_hub.urllib.request, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as there:
        monkeypatch.setattr(inputs_hub.constants, "ENDPOINT", f"http://127.0.0.1:{there.getsockname()[1]}")
        is_hub_unreachable.cache_clear()
        assert not is_hub_unreachable()
    refusing = socket.socket()  # a port of its own on which nobody listens
    refusing.bind(("127.0.0.1", 0))
    monkeypatch.setattr(inputs_hub.constants, "ENDPOINT", f"http://127.0.0.1:{refusing.getsockname()[1]}")
    is_hub_unreachable.cache_clear()
    assert is_hub_unreachable()
    for model, task in (("roberta-base", "demo/sentiment"), ("tiny-roberta", "glue/rte")):
        chosen = load_settings([f"model={model}", f"task={task}"])
        with pytest.raises(UserError, match="cannot load"):
            load_model(chosen, load_split(load_task(chosen), "train", chosen))
    assert inputs_hub.constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE  # else a minute of retries
    is_hub_unreachable.cache_clear()
    refusing.close()
