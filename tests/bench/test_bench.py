"""The benchmark: what it counts is exact and tested; what it times is only printed."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from dual_lora.bench import __main__ as command
from dual_lora.bench import cases, measure, page, record, threads
from dual_lora.bench.__main__ import main as run_bench
from tests.support.places import ROOT

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def rows(request):
    case = cases.build_layer_case(256, 256, request.param, CPU)
    return {row.method: row for row in measure.measure_case(case, rank=16, repeats=1, device=CPU)}


def test_operations_are_at_the_floor(rows):
    names = [name for name in rows if name.startswith("Dual LoRA") and name != "Dual LoRA, naive"]
    assert {"Dual LoRA", "Dual LoRA, dropout"} <= set(names)
    for name in names:
        assert 0.99 < rows[name].flops_over_floor <= 1.02, name


def test_backward_keeps_no_more_than_loras(rows):
    assert rows["Dual LoRA"].kept_bytes <= 1.05 * rows["LoRA"].kept_bytes
    assert rows["Dual LoRA, naive"].kept_bytes > 3 * 256 * 256 * 4


def test_adapters_are_of_one_size(rows):
    sizes = [row.adapter_bytes for row in rows.values()]
    assert max(sizes) < 1.1 * min(sizes)


def test_gradients_in_bfloat16_take_part_where_they_are_fast(monkeypatch):
    low = {"LoRA, dL/dx in bf16", "Dual LoRA, G in bf16", "Dual LoRA, G and dL/dx in bf16"}
    for dtype, reason, expected in (
        (torch.float32, None, True),
        (torch.float32, "slow", False),
        (torch.bfloat16, None, False),
    ):
        monkeypatch.setattr(cases, "explain_slow_bfloat16", lambda device, reason=reason: reason)
        fast = cases.has_fast_bfloat16(dtype, CPU)
        assert fast is expected and (low <= cases.list_contenders(16, True, fast).keys()) is expected


def test_the_compared_lora_rounds_what_dual_lora_rounds():
    """Same y and factors; dL/dx off by the rounding of a product's factors only."""
    model = cases.Layer(64, torch.float32).requires_grad_(False)
    x, g = torch.randn(2, 32, 64, requires_grad=True)
    exact_y, rounded_y = model(x), cases.round_input_gradients(model)(x)
    (exact,), (found,) = (torch.autograd.grad(y, x, g) for y in (exact_y, rounded_y))
    assert torch.equal(exact_y, rounded_y) and 1e-4 < (found - exact).norm() / exact.norm() < 2**-7


def test_ratios_to_the_lora_alike():
    case = cases.build_layer_case(64, 32, torch.float32, CPU)
    rows = {row.method: row for row in measure.measure_case(case, rank=8, repeats=3, device=CPU)}
    assert rows["LoRA"].step_ratio == rows["LoRA"].peer_ratio == rows["LoRA, dropout"].peer_ratio == 1
    assert rows["Dual LoRA"].peer_ratio == rows["Dual LoRA"].step_ratio
    for row in rows.values():
        assert row.quartiles[0] <= row.step_ratio <= row.quartiles[1]


def test_peak_memory_is_the_most_held_at_once():
    held = []

    def step():
        held.append(torch.ones(2**20))  # 4 MiB
        held.clear()
        held.append(torch.ones(2**18))
        return held.clear

    assert 4 * 2**20 <= measure.measure_peak_bytes(step, CPU) < 4.2 * 2**20


LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("tiny-roberta", "tiny-deberta")]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", *LONG])
def test_model_level_floor(name):
    path = str(ROOT / "dual_lora/lab/model/bundled" / name)
    case = cases.build_model_case(path, (2, 24), torch.float32, CPU)
    rows = {row.method: row for row in measure.measure_case(case, rank=16, repeats=1, device=CPU)}
    assert 0.97 < rows["Dual LoRA"].flops_over_floor <= 1.02
    assert rows["Dual LoRA"].kept_bytes <= 1.05 * rows["LoRA"].kept_bytes


@pytest.mark.slow
def test_record_is_written_added_to_and_shown(tmp_path, capsys):
    for width in ("32", "48"):
        command.main(["--width", width, "--tokens", "8", "--repeats", "1", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert len(record["cases"]) == 2 and record["hardware"]
    capsys.readouterr()
    command.main(["--show", str(path)])
    printed = capsys.readouterr().out
    assert printed.count("| Dual LoRA |") == 2 and "layer 48 x 48" in printed


def test_mistakes_are_named(capsys):
    for arguments, culprit in (
        (["--batch", "8by8"], "--batch"),
        (["--batch", "0x8"], "--batch"),
        (["--width", "0"], "--width"),
        (["--width"], "--width"),
        (["--tokens", "-3"], "--tokens"),
        (["--rank", "1"], "--rank"),
        (["--repeats", "0"], "--repeats"),
        (["--device", "foo"], "--device"),
        (["--device", "meta"], "--device"),
        (["--model", "a", "b", "c", "--batch", "1x8", "2x8"], "--batch"),
    ):
        with pytest.raises(SystemExit) as error:
            command.main(arguments)
        assert culprit in capsys.readouterr().err + str(error.value) and error.value.code


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("", "damaged (Expecting value"),
        ("{cut", "damaged (Expecting property name"),
        ("[1]", "no file of a benchmark"),
        ('{"hardware": "a", "date": "b", "cases": {"c": {}}}', "no file of a benchmark (KeyError: 'rank')"),
        ('{"hardware": "a", "date": "b", "cases": 5}', "no file of a benchmark (AttributeError: "),
    ],
)
@pytest.mark.parametrize("option", ["--show", "--trend"])
def test_a_file_that_is_no_benchmarks_is_one_line(option, content, message, tmp_path, capsys):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as error:
        command.main([option, str(path if option == "--show" else tmp_path)])
    none = f"error: {tmp_path}: no JSON file of a benchmark there"
    expected = none if (option, content) == ("--trend", None) else f"error: {path}: {message}"
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_where_nothing_can_be_written_nothing_is_measured(place, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(command, "measure_case", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match=f"error: --out {tmp_path / place}: cannot be written"):
        command.main(["--width", "8", "--tokens", "8", "--out", str(tmp_path / place)])


def test_a_damaged_file_of_the_same_day_is_named_before_anything_is_measured(tmp_path, monkeypatch):
    path = record.get_record_path(record.create_record(CPU), tmp_path)
    path.write_text("{cut")
    monkeypatch.setattr(command, "measure_case", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match=f"error: {path}: damaged"):
        command.main(["--width", "8", "--tokens", "8", "--device", "cpu", "--out", str(tmp_path)])


def test_what_was_measured_is_kept_where_nobody_reads(tmp_path, monkeypatch):
    case = page.read_rows(build_record("2026-01-02", 1.6)["cases"]["layer 8 x 8"])
    monkeypatch.setattr(command, "measure_case", lambda *_: case)
    monkeypatch.setattr(command, "format_table", lambda rows: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(SystemExit, match="error: .*full"):
        command.main(["--width", "8", "--tokens", "8", "--out", str(tmp_path)])
    assert len(list(tmp_path.iterdir())) == 1


def build_record(date, ratio, **more):
    row = measure.Row("LoRA", 1.0, 0.1, 10, None, 1, 1, 1, 0.1)
    dual = measure.Row(
        "Dual LoRA", ratio, 0.1, 15, 1.0, 1, 1, 1, 0.1, quartiles=(ratio - 0.1, ratio + 0.1), peer_ratio=ratio
    )
    case = {"rank": 16, "torch": "2", "peft": "0", "load_before": 1.5, "rows": [asdict(row), asdict(dual)]}
    return {"hardware": "a machine", "date": date, "cases": {page.SHOWN_CASES[0]: case, "layer 8 x 8": case}, **more}


def test_a_folder_is_a_history(tmp_path, capsys):
    for date, ratio in (("2026-01-02", 1.6), ("2026-02-03", 1.25)):
        (tmp_path / f"{date}-a-machine.json").write_text(json.dumps(build_record(date, ratio)))
    command.main(["--trend", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"a machine: {page.SHOWN_CASES[0]}" and "| method | 2026-01-02 | 2026-02-03 |" in lines
    assert lines.count("| Dual LoRA | 1.60 (1.50–1.70) | 1.25 (1.15–1.35) |") == 2


def test_the_page_shows_the_newest_of_each_machine(tmp_path):
    threads_found = {"step": "A layer", "cores": 2, "seconds": {"no neighbour": {"all": 0.01, "one": 0.015}}}
    for date, more in (("2026-01-02", {}), ("2026-02-03", {"threads": threads_found})):
        (tmp_path / f"{date}-a-machine.json").write_text(json.dumps(build_record(date, 1.5, **more)))
    (tmp_path / "2026-01-01-b.json").write_text(json.dumps({**build_record("2026-01-01", 1.7), "hardware": "another"}))
    tables = page.format_page_tables(tmp_path)
    assert "## another, 2026-01-01, load average 1.5 to 1.5" in tables and "## a machine, 2026-02-03" in tables
    assert "2026-01-02" not in tables and tables.count("| no neighbour | 10 (1.00) | 15 (1.50) |") == 1
    assert page.update_page(f"a\n{page.START}\nold\n{page.END}\nb", "new") == f"a\n{page.START}\n\nnew\n\n{page.END}\nb"
    with pytest.raises(ValueError, match="between which the tables go"):
        page.update_page("no marks", "new")


def test_cost_page_is_that_of_the_newest_files():
    """`python -m dual_lora.bench --page` writes them."""
    text = (ROOT / "docs/cost.md").read_text()
    assert page.update_page(text, page.format_page_tables(ROOT / "benchmarks")) == text


def test_the_page_is_rewritten_wherever_the_command_starts(tmp_path, monkeypatch):
    """In UTF-8, whatever the locale's encoding, and only if all of it can be written."""
    (tmp_path / "repository/docs").mkdir(parents=True)
    (tmp_path / "repository/benchmarks").mkdir()
    (tmp_path / "repository/benchmarks/a.json").write_text(json.dumps(build_record("2026-01-02", 1.6)))
    text = f"a \u00b1 b\n{page.START}\nold\n{page.END}\n"
    cost, folder = tmp_path / "repository/docs/cost.md", tmp_path / "repository/benchmarks"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "ROOT", tmp_path / "repository")
    with pytest.raises(SystemExit, match="cost.md is not there; only the repository has it"):
        command.main(["--page"])
    cost.write_text(text, "utf-8")
    command.main(["--page"])
    assert cost.read_text("utf-8") == page.update_page(text, page.format_page_tables(folder))
    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(record.os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "full")))
        record.replace_text(cost, "half")
    assert cost.read_text("utf-8").startswith("a \u00b1 b") and list(cost.parent.iterdir()) == [cost]


def test_a_record_is_added_to_completely_or_not_at_all(tmp_path, monkeypatch):
    record.write_record(build_record("2026-01-02", 1.6), tmp_path)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    monkeypatch.setattr(record.os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError):
        record.write_record(build_record("2026-01-02", 1.7), tmp_path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


@pytest.mark.slow
def test_threads_are_measured_with_a_neighbour_that_ends(tmp_path):
    command.main(["--threads", "--width", "64", "--tokens", "32", "--repeats", "2", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())["threads"]
    assert found["seconds"].keys() == set(threads.MACHINES)
    assert all(
        times.keys() == threads.CHOICES.keys() and min(times.values()) > 0 for times in found["seconds"].values()
    )


def test_a_process_that_ends_is_reported():
    ended = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with threads.stop_at_end(ended), pytest.raises(RuntimeError, match="ended with 0"):
        threads.request_step(ended)


def test_a_model_that_is_nowhere_is_not_measured():
    with pytest.raises(SystemExit, match="--model /nonexistent: no config.json there"):
        run_bench(["--model", "/nonexistent"])
