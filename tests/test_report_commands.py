"""The command of a cell: it composes the very run, for every experiment, and a click in the page copies it."""

import shlex
from dataclasses import replace

import pandas as pd
import pytest

from dual_lora.lab.config.compose import list_choices, load_settings
from dual_lora.lab.config.overrides import parse_overrides
from dual_lora.lab.evaluate.evaluate import MIN_FOR_CONSTANT, find_warnings
from dual_lora.lab.present.document import Table, render_html, render_html_block
from dual_lora.lab.record.identity import serialize_identity_settings
from dual_lora.lab.report.commands import build_command
from dual_lora.lab.study.experiment import Experiment, load_experiment_file
from tasks import load

# The other experiments are studies of cells, which have no runs.
TABLES = [name for name in list_choices("experiment") if "kind" not in load_experiment_file(name)]


def compose_command(command: str) -> list:
    program, script, *words = shlex.split(command)
    assert (program, script) == ("python", "train.py")
    return [load_settings(job) for job in parse_overrides([word for word in words if word != "-m"])]


@pytest.mark.parametrize("name", TABLES)
def test_the_command_of_every_cell_composes_its_run(name):
    for scale in ("full", "small", "smoke"):
        try:
            cells = Experiment.load(name, scale).compose_cells(["seed=0"])
        except Exception as error:
            assert "scale=" in str(error)
            continue
        for cell in cells[:: max(1, len(cells) // 12)]:
            (made,) = compose_command(build_command([cell.settings]))
            assert serialize_identity_settings(made) == serialize_identity_settings(cell.settings)
            assert (made.seed, made.study) == (0, cell.settings.study)


def test_several_seeds_are_one_command():
    one = load_settings(["model=tiny-roberta", "task=demo/sentiment", "method=lora", "method.rank=4", "seed=1"])
    command = build_command([one, replace(one, seed=2)])
    assert command.startswith("python train.py -m model=tiny-roberta task=demo/sentiment method=lora method.rank=4")
    assert [made.seed for made in compose_command(command)] == [1, 2]


def test_when_checkpoints_are_written_is_no_part_of_a_command():
    words = ["model=tiny-roberta", "task=demo/sentiment", "method=lora"]
    often = load_settings([*words, "train.save_minutes=5", "train.save_steps=10"])
    assert build_command([often]) == build_command([load_settings(words)])


def test_folders_are_named_as_ones_to_fill_in_and_texts_are_quoted():
    settings = load_settings(["model=tiny-gpt2", "task=e2e", "task.options.separator='<|endoftext|>'"])
    settings = replace(settings, data_dir="/secret/place", init_from="/secret/runs/nlg/tiny_e2e_s0_abc")
    command = build_command([settings])
    assert "data_dir=DIR" in command and "secret" not in command
    assert "init_from=runs/adhoc/tiny_e2e_s0_abc" in command
    assert any(word == "task.options.separator='<|endoftext|>'" for word in shlex.split(command))


def test_a_click_copies_the_command_and_other_pages_have_no_script():
    cells = pd.DataFrame([{"method": "LoRA", "score": "1.0"}])
    commands = pd.DataFrame([{"method": "", "score": "python train.py 'a<b'"}])
    table = Table(cells, "A table", commands=commands)
    html = render_html_block(table)
    assert html.count("data-command=") == 1 and 'data-command="python train.py &#x27;a&lt;b&#x27;"' in html
    assert "clipboard" in render_html([table], "Page") and "<script" not in render_html([Table(cells, "A")], "Page")


def test_the_same_output_for_every_row_is_a_warning():
    task = load("demo/sentiment")
    rows = [{"split": "validation", "output": 1} for _ in range(MIN_FOR_CONSTANT)]
    assert find_warnings(task, rows) == [f"validation: all {MIN_FOR_CONSTANT} outputs are 1"]
    assert (
        find_warnings(task, rows[1:]) == [] and find_warnings(task, [*rows, {"split": "validation", "output": 0}]) == []
    )
