"""How many threads torch computes with, and how they wait. To be called before torch is imported.

OpenMP's threads spin while they wait for each other. On a machine whose cores other programs use as well, a thread that
is not scheduled then holds up all others at the end of every small parallel region: training becomes up to ten times
slower than with a single thread. Threads that sleep while they wait cost a little on a quiet machine and lose nothing
on a busy one.
"""

import math
import os
from pathlib import Path

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
# The user's own choices, by any of the libraries that torch may be built with, go before ours.
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def count_available_cores() -> int:
    """Return how many cores this process may use: what its affinity and its control group allow, at least one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_QUOTA.read_text().split()
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
