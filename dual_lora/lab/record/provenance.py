"""Versions, machine and code a run was done with."""

import hashlib
import os
import platform
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dual_lora.lab.config import paths
from dual_lora.lab.config.outside.plugins import describe_plugins
from dual_lora.lab.config.secrets import redact_secrets
from dual_lora.lab.system.distributed import count_processes
from dual_lora.lab.system.environment import count_available_cores, describe_variables
from dual_lora.lab.system.libraries import describe_float32_products
from dual_lora.lab.system.sealed import hash_file

PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "datasets", "safetensors", "triton", "numpy")
PACKAGES += ("scikit-learn", "scipy", "sacrebleu", "pycocoevalcap", "hydra-core", "omegaconf", "bitsandbytes")
# The parts of the repository that can change a digit of a run, as git names paths.
CODE = ("dual_lora/", "tasks/", "conf/", ":(glob)*.py", "pyproject.toml")
# From version 2 on, every file of a record that is read back is sealed; older records have no version.
RECORD_VERSION = 2
# The fields of an environment that the environment of a resumed run does not keep about each earlier attempt
# (`earlier_tries`): they are the same, or describe still earlier attempts.
RUN_FIELDS = ("identity", "model_files", "earlier_tries", "earlier_commits")


@cache
def get_installed_version(package: str) -> str | None:
    """Return the version of a package that this process started with; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run_git(*args: str) -> str | None:
    """Return git's output for this repository; None without git or a repository. GIT_* variables, which hooks set, are
    removed because they could point to another repository."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(["git", "-C", paths.ROOT, *args], capture_output=True, text=True, env=variables)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def has_uncommitted_changes() -> bool | None:
    """Return whether code or settings differ from the commit, new files included; None where git does not say."""
    answer = run_git("status", "--porcelain", "--untracked-files=all", "--", *CODE)
    return None if answer is None else bool(answer)


def merge_environments(begun: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the environment of a resumed run: the present one plus the earlier attempts. It counts as committed only
    if every attempt was."""
    earlier_commits = [*begun.get("earlier_commits", []), begun.get("commit")]
    uncommitted = [begun.get("uncommitted_changes"), now["uncommitted_changes"]]
    found = {"uncommitted_changes": True if True in uncommitted else None if None in uncommitted else False}
    attempt = {name: value for name, value in begun.items() if name not in RUN_FIELDS}
    found["earlier_tries"] = [*begun.get("earlier_tries", []), attempt]
    found["earlier_commits"] = [c for c in dict.fromkeys(earlier_commits) if c != now["commit"]]
    return now | found | {"started": begun.get("started", now["started"])}


@cache
def hash_code() -> str:
    """Return a SHA-256 over the code and the configuration files that this process started with."""
    digest = hashlib.sha256()
    for path in sorted(
        [*paths.ROOT.glob("dual_lora/**/*.py"), *paths.ROOT.glob("tasks/**/*.py"), *paths.ROOT.glob("conf/**/*.yaml")]
    ):
        digest.update(f"{path.relative_to(paths.ROOT)} {hash_file(path)}\n".encode())
    return digest.hexdigest()


@cache
def describe_code() -> dict[str, Any]:
    """Return the commit and the code of this process as they were when it first asked: a commit made later is not what
    it runs."""
    return {
        "commit": run_git("rev-parse", "HEAD"),
        "uncommitted_changes": has_uncommitted_changes(),
        "code": hash_code(),
    }


def name_program(path: str) -> str:
    """Return a script's path within the repository; of one from elsewhere only its name, because where it lies says
    nothing about the run."""
    script = Path(path).resolve()
    return script.relative_to(paths.ROOT).as_posix() if script.is_relative_to(paths.ROOT) else script.name


def describe_environment() -> dict[str, Any]:
    """Return what can change a digit of a result in addition to the identity's facts: versions, machine, numerical
    settings, code."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "record_version": RECORD_VERSION,
        "python": platform.python_version(),
        "packages": {p: get_installed_version(p) for p in PACKAGES},
        "platform": platform.platform(),
        "processor": get_processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": "cuda" if cuda else "cpu",
        "accelerator": torch.cuda.get_device_name() if cuda else None,
        "devices": torch.cuda.device_count() if cuda else 1,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "processes": count_processes(),
        "threads": torch.get_num_threads(),
        "cores": count_available_cores(),
        "deterministic": {
            "algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn": torch.backends.cudnn.deterministic,
            "benchmark": torch.backends.cudnn.benchmark,
        },
        **describe_float32_products(),
        "variables": describe_variables(),
        **describe_code(),
        **({"plugins": plugins} if (plugins := describe_plugins()) else {}),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [name_program(sys.argv[0]), *(redact_secrets(word) for word in sys.argv[1:])],
    }


def get_machine(environment: dict) -> str | None:
    """Return the accelerator or, without one, the processor of a run, from its recorded environment."""
    return environment.get("accelerator") or environment.get("processor")


def list_attempts(environment: dict) -> list[dict]:
    """Return the environments of a run's attempts, as far as its recorded one names their machines: older records name
    only the last machine."""
    return [environment, *(attempt for attempt in environment.get("earlier_tries", []) if get_machine(attempt))]


def get_processor_name() -> str:
    """Return the processor's name from Linux's /proc/cpuinfo, or Python's name for it elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def has_changed_plugins(made_with: dict) -> bool:
    """Return whether a run was done with other versions of plugins than those of this command."""
    now = describe_plugins()
    recorded = made_with.get("plugins") or {}
    return any(recorded[name]["sha256"] != now[name]["sha256"] for name in recorded.keys() & now.keys())


def is_committed(made_with: dict) -> bool:
    """Return whether a run was done with only committed code, as far as its environment says."""
    return made_with.get("uncommitted_changes") is False and not made_with.get("plugins")
