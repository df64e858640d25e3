"""`make gpu` without a GPU: it says so, resumes by part, and its parts run in small on a CPU."""

import json

import pytest
import torch

from tools import gpu_check

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DUAL_LORA_BENCHMARKS", str(tmp_path))
    return tmp_path


def test_without_a_card_nothing_is_measured(folder, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 0
    assert "no CUDA device here" in capsys.readouterr().out and not list(folder.iterdir())


def test_a_part_that_is_not_known_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["kernles"])
    assert "kernles: parts are kernels, layers" in capsys.readouterr().err


def test_a_call_goes_on_with_the_parts_that_have_no_result(folder, monkeypatch):
    ran = []

    def run(part, device):
        ran.append(part)
        bad = part == "fsdp2" and len(ran) == 3
        return {"part": part, "seconds": 1, **({"failed": "cut off"} if bad else {"result": {"a": 1}})}

    monkeypatch.setattr(gpu_check, "run_part", run)
    assert gpu_check.main(["kernels", "step", "fsdp2", "--device", "cpu"]) == 1
    assert gpu_check.main(["--device", "cpu"]) == 0
    assert ran == ["kernels", "step", "fsdp2", "layers", "fsdp2", "memory"]
    (path,) = folder.iterdir()
    assert json.loads(path.read_text())["checks"].keys() == gpu_check.PARTS.keys()


def test_all_parts_fit_in_ten_minutes():
    assert gpu_check.SECONDS.keys() == gpu_check.PARTS.keys() and sum(gpu_check.SECONDS.values()) <= 600


def test_the_kernels_of_training_agree():
    losses = [found["loss"] for found in gpu_check.measure_steps(CPU).values()]
    assert len(losses) == 3 and max(losses) - min(losses) < 0.02


def test_one_sharded_device_computes_what_one_device_does():
    assert gpu_check.check_fsdp2(CPU)["difference"] < 1e-2


def test_the_counted_memory_is_near_the_peak():
    assert 0.5 < gpu_check.compare_memory(CPU)["ratio"] < 2


def test_a_wrong_kernel_is_found(monkeypatch):
    """The reference itself as the kernel is right; with a wrong scale it is not."""
    from dual_lora.kernels import recompute

    wrong = recompute.Ops(lambda *args, **kwargs: 1.01 * recompute.rebuild(*args, **kwargs), recompute.project)
    assert gpu_check.compare_kernel(torch.float32, 64, recompute.TORCH, CPU) < gpu_check.TOLERANCE["float32"]
    assert gpu_check.compare_kernel(torch.float32, 64, wrong, CPU) > gpu_check.TOLERANCE["float32"]
    assert gpu_check.compare_kernel(torch.bfloat16, 64, recompute.TORCH, CPU) < gpu_check.TOLERANCE["bfloat16"]


@pytest.mark.slow
def test_parts_run_in_processes_of_their_own(folder, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_check.main(["kernels", "layers", "--device", "cpu"]) == 0
