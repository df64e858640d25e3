"""Two gloo processes under torchrun train to the weights of one process."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from tests.tuner.distributed_worker import EVALUATED, HAS_FSDP2, train

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
needs_fsdp2 = pytest.mark.skipif(not HAS_FSDP2, reason="FSDP2 of torch 2.7 does neither gloo nor two dtypes")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    path = tmp_path_factory.mktemp("two") / "results.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.tuner.distributed_worker", str(path)]
    run = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(path)


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp2", marks=needs_fsdp2)])
def test_two_processes_equal_one(mode, two_processes):
    alone, shared = train("none"), two_processes[mode]
    assert shared["ramp"] == alone["ramp"] == {(3, 1.0)} and alone["losses"][-1] < alone["losses"][0]
    assert shared["weights"].keys() == alone["weights"].keys()
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(shared["weights"][name], weight, rtol=1e-4, atol=1e-6, msg=name)


@needs_fsdp2
def test_fsdp2_on_a_bf16_base(two_processes):
    shared = two_processes["fsdp2-bf16"]
    assert shared["ramp"] == {(3, 1.0)} and shared["losses"][-1] < shared["losses"][0]
    assert {w.dtype for w in shared["weights"].values()} == {torch.float32}


@pytest.mark.parametrize("mode", EVALUATED)
def test_no_process_keeps_whole_matrices_of_sharded_weights(mode, two_processes):
    layers = 14 if mode == "ddp" else 0
    assert two_processes["caches"][mode] == {"evaluation": layers, "training": layers}
