"""Every command of the README and of docs/ is executed, made short: few steps and examples, small files for DIR."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dual_lora.bench import __main__ as bench
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.plan import compute_plan, format_plan
from tests.support import forked
from tests.support.official_files import write_official
from tests.support.pages import COMMANDS, PAGES, README, words
from tests.support.places import ROOT

MAX_README_LINES = 150
SHORT = ["train.max_steps=2", "train.max_examples=64", "eval.max_examples=4", "wandb.mode=disabled"]


def test_the_readme_is_read_in_ten_minutes():
    assert len(COMMANDS) > 8 and "@@" not in README
    assert len(README.splitlines()) <= MAX_README_LINES


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", PAGES[page]):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_the_index_lists_every_page():
    listed = set(re.findall(r"\]\((\w[\w-]*\.md)\)", PAGES["docs/index.md"]))
    assert listed | {"index.md"} == {path.name for path in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command):
    done = subprocess.run(["make", "-n", *words(command)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def small_bert(tmp_path_factory):
    """An untrained BERT of MiniLM's form, with the tokenizer of a bundled model."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "dual_lora/lab/model/bundled/tiny-deberta")
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), pad_token_id=0, **size)).save_pretrained(folder)
    return folder


ALONE = "python train.py"  # in a process of its own, the others in forks of this one
ELSEWHERE = (" -m dual", "hydra/launcher", "torchrun")  # below, in test_launchers.py and in test_distributed.py


def started(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=1500)


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """The folder of a finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RUNS", tmp_path_factory.mktemp("run"))
        done = forked.run("train.py", *SHORT)
        assert done.returncode == 0, done.stderr
        (folder,) = paths.RUNS.glob("adhoc/*")
    return folder


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if not c.startswith("make ") and not any(part in c for part in ELSEWHERE)]
)
def test_commands_run(command, runs_folder, small_bert, a_run, tmp_path):
    write_official(tmp_path, "sst2")
    write_own_data(tmp_path, command)
    write_outside(tmp_path)
    shutil.copytree(a_run, runs_folder / "adhoc" / a_run.name)
    places = {
        "run=runs/adhoc/ID": f"run={runs_folder / 'adhoc' / a_run.name}",
        "init_from=runs/adhoc/ID": f"init_from={runs_folder / 'adhoc' / a_run.name}",
        "export=DIR": f"export={tmp_path / 'exported'}",
        "save_updates=updates.safetensors": f"save_updates={tmp_path / 'updates.safetensors'}",
        "model.path=DIR": f"model.path={small_bert}",
        "model=DIR": f"model={small_bert}",
        "plugins=stars.py": f"plugins={tmp_path / 'stars.py'}",
        "settings": str(tmp_path / "settings"),
        "data_dir=DIR": f"data_dir={tmp_path}",
    }
    arguments = [places.get(word, word) for word in words(command)[1:]]
    arguments = [word for word in arguments if not word.startswith("train.epochs=")]  # `shortened` says how many steps
    done = (started if command == ALONE else forked.run)(*arguments, *shortened(arguments))
    assert done.returncode == 0, done.stderr


def write_outside(folder: Path) -> None:
    """Write the code and the settings files that docs/extending.md shows for an own task."""
    page = PAGES["docs/extending.md"].partition("## Outside the repository")[2]
    (folder / "stars.py").write_text(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0])
    for name, content in re.findall(r"`settings/(\S+)`:\n\n```yaml\n(.*?)```", page, re.DOTALL):
        (folder / "settings" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "settings" / name).write_text(content)


def write_own_data(folder: Path, command: str) -> None:
    """Write small tables of the form that a command's task reads, if it reads tables of one's own."""
    if "task=classification" in command or "plugins=" in command:
        columns = [
            next((w.partition("=")[2] for w in words(command) if w.startswith(key)), default)
            for key, default in (("task.options.text=", "text"), ("task.options.label=", "label"))
        ]
        lines = ["\t".join(columns), *(f"a text number {i}\t{'yes' if i % 2 else 'no'}" for i in range(40))]
        (folder / "train.tsv").write_text("\n".join(lines) + "\n")
    elif "task=instruction" in command:
        rows = [{"prompt": f"Say {i}.", "response": f"It is {i}."} for i in range(40)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def shortened(arguments: list[str]) -> list[str]:
    """Return what makes a command short that trains, where it does not say so itself."""
    if arguments[0] == "eval.py" or "--help" in arguments:
        return []
    short = SHORT if arguments == ["train.py"] else [*SHORT, "eval.before=false"]
    if arguments[0] == "sweep.py" and any(a in ("experiment=fit", "experiment=teacher") for a in arguments):
        return ["scale=smoke"]  # studies without a model
    short = [*short, "seed=0"] if arguments[0] == "sweep.py" else short
    return [word for word in short if word.partition("=")[0] not in {a.partition("=")[0] for a in arguments}]


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("python -m dual_lora.bench") and "--threads" not in c]
)
def test_the_benchmark_runs_as_written(command, tmp_path, monkeypatch):
    for folder in ("docs", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    if measures := "--out" in words(command):
        shutil.rmtree("benchmarks")
    bench.main([*words(command)[3:], *(["--width", "32", "--tokens", "8", "--repeats", "1"] if measures else [])])
    assert not measures or len(list(Path("benchmarks").glob("*.json"))) == 1


def list_rows(text: str) -> list[list[str]]:
    """Return the cells of every line below the head of Markdown tables, without emphasis."""
    table = re.compile(r"^\|[^\n]*\n\|[-:| ]+\n((?:\|[^\n]*\n?)*)", re.MULTILINE)
    lines = [line for body in table.findall(text) for line in body.splitlines()]
    return [[cell.strip().strip("*") for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.parametrize(
    ("page", "section", "report", "rows"),
    [
        ("results", "## Dual LoRA against full tuning, LoRA, LoRA+ and DoRA", "verdict", 26),
        ("results", "## The ratio of the two ranks", "ratio", 10),
        ("results", "## Do trained signs", "frozen_groups", 12),
        ("results", "## Base size", "base_size", 6),
        ("results", "## Gradients in bfloat16", "gradient_dtype", 2),
        ("explorations", "## All methods at half their rates", "half_rates", 9),
        ("explorations", "## Base size at half the rates", "base_size_half_rates", 6),
        ("explorations", "## Dual LoRA's own settings", "own_knobs", 4),
        ("explorations", "## What training can fit", "fit", 9),
        ("explorations", "## How similar updates are", "similarity", 10),
        ("explorations", "## How much rank the score needs", "truncation", 3),
    ],
)
def test_the_results_are_those_of_the_reports(page, section, report, rows):
    part = PAGES[f"docs/{page}.md"].partition(section)[2].partition("\n#")[0]
    known = list_rows((ROOT / "runs" / report / "report/table.md").read_text())
    lines = list_rows(part)
    assert len(lines) == rows
    for row in lines:
        wanted = [cell for cell in row if cell and not re.fullmatch(r"[\d.]+e-\d|–", cell)]  # reports write 0.002
        labels = {cell for cell in wanted if not re.match(r"[-+]?[\d.,]+( |$)", cell)}
        places = [candidate for candidate in known if labels <= set(candidate)]
        assert all(any(cell in place for place in places) for cell in wanted), row


def test_the_verdict_of_the_readme_is_that_of_the_results():
    results = list_rows(PAGES["docs/results.md"])
    lines = list_rows(PAGES["README.md"].partition("## The verdict so far")[2].partition("\n#")[0])
    assert len(lines) == 6
    for label, *cells in lines:
        name = label.removeprefix("Score of ")
        known = " ".join(" ".join(row) for row in results if {name, f"Dual LoRA - {name}"} & set(row[:2]))
        for number in re.findall(r"[-+]?\d+\.\d", " ".join(cells)):
            assert number in known.split(), (label, number)


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_plan_is_as_shown(runs_folder):
    (command,) = [c for c in COMMANDS if "model=llama3-8b" in c and "plan=true" in c]
    settings = load_settings(words(command)[2:])
    lines = format_plan(compute_plan(settings), Run.prepare(settings).record).splitlines()
    assert len(lines) == 7
    for line in lines[:-1]:
        assert line in PAGES["docs/planning.md"]


@pytest.mark.parametrize("page", ["README.md", "docs/method.md"])
def test_the_python_example_adapts_any_model(page, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    folder = str(ROOT / "dual_lora/lab/model/bundled/tiny-llama")
    (code,) = re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)
    names = {"base": AutoModelForCausalLM.from_pretrained(folder), "FOLDER": folder}
    exec(code, names)
    trained = {n.rsplit(".", 1)[1] for n, p in names["model"].named_parameters() if p.requires_grad}
    assert trained == {"A", "B", "C", "D"}
