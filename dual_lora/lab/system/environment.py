"""The process's environment, as libraries will read it when they are imported.

What would silently change a run is removed or refused: precision, compilation and accumulation come only from the
settings. Other variables that can change a digit are left as they are and recorded in environment.json.

Threads: OpenMP threads spin while they wait for each other. If other programs share the cores, one thread that is not
scheduled then holds up all the others at the end of every small parallel region: training becomes up to ten times
slower than with a single thread. Sleeping threads cost a little on an idle machine and nothing on a busy one.
"""

import math
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from dual_lora.lab.config.secrets import redact_secrets
from dual_lora.lab.errors import UserError, require

# Prefixes of variables that libraries read and that could override the settings.
OVERRIDES = (
    "ACCELERATE_", "FSDP_", "FP8_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "TORCHDYNAMO_", "TORCH_COMPILE_",
    "XLA_USE_BF16", "XLA_DOWNCAST_BF16", "USE_TORCH_XLA", "TRANSFORMERS_SDPA_FORCE_GQA", "USE_HUB_KERNELS",
    "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
)  # fmt: skip
# Of those, what asks for another kind of training altogether.
UNSUPPORTED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
OFF_VALUES = ("", "0", "no", "false", "none", "default", "off", "strict")
# What decides which kernels run or in which order numbers are added, by how the names begin. LD_PRELOAD
# may bring another BLAS or OpenMP.
RECORDED = (
    "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "BLIS_", "VECLIB_", "DNNL_", "ONEDNN_", "ATEN_", "TORCH", "PYTORCH_",
    "CUDA_", "CUBLAS", "CUDNN_", "NVIDIA_", "HIP_", "MIOPEN_", "TRITON_", "FLASH_ATTENTION_", "DISABLE_ADDMM_", "NCCL_",
    "GLOO_", "BNB_", "TRANSFORMERS_DISABLE_", "PYTHONHASHSEED", "GLIBC_TUNABLES", "LC_ALL", "LC_NUMERIC",
    "LANG", "NPY_", "SCIPY_", "ROCBLAS_", "HIPBLAS", "TENSILE_", "LD_PRELOAD",
)  # fmt: skip
# What torchrun sets, and how the variables of other launchers begin.
OWN_PROCESS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
OTHER_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
OTHER_PROCESSES = ("OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_", "MPI_LOCAL", "LOCAL_WORLD_SIZE")
TORCHRUN = "start several processes with torchrun --nproc-per-node N"
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
BARS_VARIABLE = "TQDM_DISABLE"
# If the user set one of these, for whichever OpenMP torch is built with, it takes precedence over ours.
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def list_variables(beginnings: Iterable[str]) -> list[str]:
    """Return the names of the environment's variables that begin like this, sorted."""
    return sorted(name for name in os.environ if name.startswith(tuple(beginnings)))


def isolate_environment() -> None:
    """Remove variables that the settings decide, report those that asked for something else, and set up threads. Call
    this before torch is imported.

    Raises:
        UserError: a variable asks for a kind of training that is not supported, or those of the processes conflict.
    """
    for name in UNSUPPORTED:
        value = os.environ.get(f"ACCELERATE_USE_{name}", "")
        require(
            value.lower() in OFF_VALUES,
            f"ACCELERATE_USE_{name}={value[:80]}: not supported; unset it and take hardware=ddp or hardware=fsdp2",
        )
    removed = {name: os.environ.pop(name) for name in list_variables(OVERRIDES)}
    if removed.get(ACCUMULATION) == "1":
        del removed[ACCUMULATION]
    asked = [f"{name}={value[:80]}" for name, value in removed.items() if value.lower() not in OFF_VALUES]
    if asked:
        print(f"ignored: {', '.join(asked)}; only the settings decide how a run computes", file=sys.stderr)
    check_processes()
    configure_threads()


def check_processes() -> None:
    """Refuse contradictory variables about this process's place among others, and remove those of no use.

    Raises:
        UserError: the variable and the remedy.
    """
    variables = os.environ
    if "WORLD_SIZE" not in variables:
        for name in OTHER_SIZES:
            value = variables.get(name, "1")
            require(value == "1", f"{name}={value[:80]}: started by mpirun or srun; {TORCHRUN}")
        rank = variables.get("LOCAL_RANK")
        require(rank is None, f"LOCAL_RANK={rank}: set without WORLD_SIZE; unset it, or {TORCHRUN}")
    elif (size := read_whole_number("WORLD_SIZE", least=1)) > 1:
        index = read_whole_number("RANK")
        require(index < size, f"RANK={index}: must be below WORLD_SIZE={size}; {TORCHRUN}")
        read_whole_number("LOCAL_RANK")
        read_whole_number("MASTER_PORT")
        require(bool(variables.get("MASTER_ADDR")), f"MASTER_ADDR: not set along with WORLD_SIZE={size}; {TORCHRUN}")
    useless = OTHER_PROCESSES if int(variables.get("WORLD_SIZE", 1)) > 1 else (*OTHER_PROCESSES, *OWN_PROCESS)
    for name in list_variables(useless):
        del variables[name]


def read_whole_number(name: str, least: int = 0) -> int:
    """Return a variable that must hold a whole number.

    Raises:
        UserError: it does not, or holds a lower one than `least`.
    """
    value = os.environ.get(name, "")
    is_number = value.isascii() and value.isdigit() and len(value) < 10
    if not is_number or int(value) < least:
        raise UserError(f"{name}={value[:80]}: must be a whole number from {least}; unset it, or {TORCHRUN}")
    return int(value)


def describe_variables() -> dict[str, str]:
    """Return the variables that can change a digit of a result, without secrets. Cache locations are left
    out, because torch puts a path of the user's there. Preloaded libraries appear by file name only."""
    names = (name for name in list_variables(RECORDED) if not name.endswith("_DIR"))
    found = {name: redact_secrets(os.environ[name]) for name in names}
    if "LD_PRELOAD" in found:
        found["LD_PRELOAD"] = re.sub(r"[^\s:]*/", "", found["LD_PRELOAD"])
    return found


def hide_bars() -> None:
    """Have progress bars hidden in this process and in those that it starts: several runs share the screen."""
    os.environ[BARS_VARIABLE] = "1"


def hides_bars() -> bool:
    """Return whether progress bars are hidden. As for tqdm itself, any value but an empty one says so, also 0."""
    return bool(os.environ.get(BARS_VARIABLE))


def count_available_cores() -> int:
    """Return how many cores this process may use: what its affinity and its control group allow, at least one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_QUOTA.read_text("utf-8").split()
        allowed = min(allowed, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no control group, or "max": no limit
        pass
    return max(1, allowed)


def configure_threads() -> None:
    """Let torch's threads sleep while they wait, and start no more of them than there are cores to run on, unless the
    environment says otherwise."""
    if not any(name in os.environ for name in WAIT_VARIABLES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    cores = count_available_cores()
    if "OMP_NUM_THREADS" not in os.environ and cores < (os.cpu_count() or 1):
        os.environ["OMP_NUM_THREADS"] = str(cores)
