"""The command of a cell: it composes the very run, for every experiment, and a click in the page copies it."""

import random
import shlex
from dataclasses import replace

import pandas as pd
import pytest

from dual_lora.lab.config.compose import list_choices, load_settings
from dual_lora.lab.config.outside.words import take_outside_words
from dual_lora.lab.config.overrides import parse_override, parse_overrides
from dual_lora.lab.evaluate.evaluate import MIN_FOR_CONSTANT, find_warnings
from dual_lora.lab.present.document import Table, render_html, render_html_block
from dual_lora.lab.record.identity import serialize_identity_settings
from dual_lora.lab.report.command_lines import build_command, build_sweep_command, format_override
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


@pytest.fixture
def own_words(tmp_path):
    """The words for a task and an experiment of one's own, which no later test knows."""
    settings, code = tmp_path / "settings", tmp_path / "stars.py"
    for name, content in (
        ("task/stars.yaml", "name: stars\nepochs: 3\nbatch_size: 8\nmax_length: 64\noptions: {text: review}\n"),
        ("experiment/mine.yaml", "title: Mine\n"),
    ):
        (settings / name).parent.mkdir(parents=True)
        (settings / name).write_text(content)
    code.write_text(
        "from tasks.classification import Classification\n"
        "def task(subset, text='text'):\n    return Classification((text, '', 'label'), 'accuracy', (), {})\n"
    )
    yield [f"plugins={code}", "--config-dir", str(settings)]
    take_outside_words([])


def test_code_and_settings_from_outside_are_part_of_a_command(own_words):
    take_outside_words(own_words)
    common = ["model=tiny-roberta", "method=lora"]
    command = build_command([load_settings([*common, "task=stars"])])
    assert command.startswith("python train.py plugins=stars.py --config-dir DIR model=tiny-roberta task=stars ")
    assert build_command([load_settings([*common, "task=demo/sentiment"])]).startswith("python train.py plugins=stars")
    sweep = "python sweep.py plugins=stars.py --config-dir DIR experiment=mine scale=smoke"
    assert build_sweep_command("mine", "smoke") == sweep
    take_outside_words(own_words[1:])  # a folder that the command chooses nothing of
    assert build_sweep_command("cost", "smoke") == "python sweep.py experiment=cost scale=smoke"


def test_several_pieces_of_code_are_one_word(tmp_path):
    names = [tmp_path / "größe", tmp_path / "stars.py"]
    names[0].mkdir()
    (names[0] / "__init__.py").touch(), names[1].touch()
    try:
        take_outside_words([f"plugins=['{names[1]}','{names[0]}']"])
        word = shlex.split(build_sweep_command("cost", "smoke"))[2]
    finally:
        take_outside_words([])
    assert parse_override(word).value() == ["größe", "stars.py"]


@pytest.mark.parametrize("text", ["Größe", "a\\", "C:\\data", "a\\'b", "\\'", "it's", "\\d+", "\\\\"])
def test_a_text_of_any_characters_is_part_of_a_command(text):
    settings = load_settings(["model=tiny-gpt2", "task=e2e", f"task.options.separator={format_override(text)}"])
    assert settings.task.options["separator"] == text
    (made,) = compose_command(build_command([settings]))
    assert made.task.options == settings.task.options


def test_hydra_reads_every_value_back_as_it_was():
    draw = random.Random(0)
    parts = [*"aB10.-+'\"\\,=[]{}() :/#$~@é%_*?&|<", "null", "true", "e5", "inf", "nan"]
    texts = {"".join(draw.choices(parts, k=draw.randint(1, 6))) for _ in range(400)}
    for text in sorted(texts):
        for value in (text, [text, text], {"key": text}):
            assert parse_override(f"key={format_override(value)}").value() == value
            (run,) = parse_overrides([f"task.options.key={format_override(value)}"])
            assert parse_override(run[0]).value() == value


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
