"""The benchmark: what it counts is exact and tested; what it times is only printed."""

import json

import pytest
import torch
from conftest import ROOT

from dual_lora import bench

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def rows(request):
    case = bench.layer_case(256, 256, request.param, CPU)
    return {row.method: row for row in bench.measure(case, rank=16, repeats=1, device=CPU)}


def test_operations_are_at_the_floor(rows):
    for name in ("Dual LoRA", "Dual LoRA, dropout"):
        assert 0.99 < rows[name].flops_over_floor <= 1.02, name


def test_backward_keeps_no_more_than_loras(rows):
    assert rows["Dual LoRA"].kept_bytes <= 1.05 * rows["LoRA"].kept_bytes
    assert rows["Dual LoRA, naive"].kept_bytes > 3 * 256 * 256 * 4


def test_adapters_are_of_one_size(rows):
    sizes = [row.adapter_bytes for row in rows.values()]
    assert max(sizes) < 1.1 * min(sizes)


def test_peak_memory_is_the_most_held_at_once():
    held = []

    def step():
        held.append(torch.ones(2**20))  # 4 MiB
        held.clear()
        held.append(torch.ones(2**18))
        return held.clear

    assert 4 * 2**20 <= bench.peak_bytes(step, CPU) < 4.2 * 2**20


LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("tiny-roberta", "tiny-deberta")]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", *LONG])
def test_model_level_floor(name):
    path = str(ROOT / "dual_lora/lab/model/bundled" / name)
    case = bench.model_case(path, (2, 24), torch.float32, CPU)
    rows = {row.method: row for row in bench.measure(case, rank=16, repeats=1, device=CPU)}
    assert 0.97 < rows["Dual LoRA"].flops_over_floor <= 1.02
    assert rows["Dual LoRA"].kept_bytes <= 1.05 * rows["LoRA"].kept_bytes


@pytest.mark.slow
def test_record_is_written_added_to_and_shown(tmp_path, capsys):
    for width in ("32", "48"):
        bench.main(["--width", width, "--tokens", "8", "--repeats", "1", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert len(record["cases"]) == 2 and record["hardware"]
    capsys.readouterr()
    bench.main(["--show", str(path)])
    printed = capsys.readouterr().out
    assert printed.count("| Dual LoRA |") == 2 and "layer 48 x 48" in printed


def test_mistakes_are_named(capsys):
    for arguments, culprit in (
        (["--batch", "8by8"], "--batch"),
        (["--model", "a", "b", "c", "--batch", "1x8", "2x8"], "--batch"),
    ):
        with pytest.raises(SystemExit) as error:
            bench.main(arguments)
        assert culprit in capsys.readouterr().err + str(error.value)
