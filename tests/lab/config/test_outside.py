"""Settings files and code from outside of the repository, for train.py, sweep.py and eval.py."""

# ruff: noqa: E501 - a table

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tasks
from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.commands.sweep import sweep_command
from dual_lora.lab.commands.train import train_command
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import compose_choices, load_choice_file, load_settings
from dual_lora.lab.config.outside.models import load_families
from dual_lora.lab.config.outside.words import take_outside_words
from dual_lora.lab.errors import EXIT_USER, UserError
from dual_lora.lab.record.identity import compute_identity, select_identity_settings
from tests.support.places import ROOT

CODE = """
from sklearn.metrics import cohen_kappa_score
from tasks.classification import Classification


class Stars(Classification):
    name = "stars"

    def score(self, results):
        (rows,) = results.values()
        pairs = [row["answer"] for row in rows], [row["gold"] for row in rows]
        return {**super().score(results), "kappa": float(cohen_kappa_score(*pairs, weights="quadratic"))}


def task(subset, text="text", label="label"):
    return Stars((text, "", label), "kappa", (), {})
"""
FILES = {
    "task/stars.yaml": "name: stars\nepochs: 3\nbatch_size: 8\nmax_length: 64\noptions: {text: text, label: label}\n",
    "method/lora_mlp.yaml": "name: lora_mlp\nlr: 1e-3\nrank: 4\nalpha: 4\ndropout: 0.0\npeft: {peft_type: LORA, r: "
    "'${method.rank}', lora_alpha: '${method.alpha}', lora_dropout: '${method.dropout}', rank_pattern: {}}\n",
    "experiment/mine.yaml": "title: My own table\ncells: {LoRA: [method=lora_mlp], Dual LoRA: [method=dual_lora]}\n"
    "columns: task.name\nrows: [model.name]\nsmoke:\n  seeds: [0]\n  run: [model=tiny-roberta, task=stars]\n",
}
SHORT = ["train.max_steps=2", "eval.max_examples=6", "wandb.mode=disabled"]


@pytest.fixture(autouse=True)
def nothing_outside():
    yield
    take_outside_words([])


def write_files(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def own(tmp_path, own_data) -> list[str]:
    """The words for an own task, whose metric is its own, with own settings and own data."""
    write_files(tmp_path / "settings", FILES)
    (tmp_path / "stars.py").write_text(CODE)
    words = [f"plugins={tmp_path / 'stars.py'}", "--config-dir", str(tmp_path / "settings"), "task=stars"]
    return [*words, f"data_dir={own_data}", "model=tiny-roberta"]


def list_runs(runs: Path) -> list[Path]:
    return sorted(path.parent for path in runs.glob("*/*/result.json"))


# Runs.


def test_an_own_task_metric_and_method_are_trained_and_evaluated_from_the_record(own, tmp_path, runs_folder, capsys):
    assert train_command([*own, "method=lora_mlp", *SHORT]) == 0
    (run,) = list_runs(runs_folder)
    result = json.loads((run / "result.json").read_text())
    assert (
        result["metric"] == "kappa" and result["task"] == "stars" and run.name.startswith("tiny-roberta_stars_lora_mlp")
    )
    plugins = json.loads((run / "environment.json").read_text())["plugins"]
    code = tmp_path / "stars.py"
    assert plugins == {"stars": {"path": "stars.py", "sha256": tasks.plugins["stars"].sha256}}
    shutil.rmtree(tmp_path / "settings")  # the record holds what they said
    assert evaluate_command([f"run={run}", f"plugins={code}"]) == 0
    assert "reproduced exactly" in capsys.readouterr().out
    with pytest.raises(UserError, match="done with code of stars.py; to run that code again, add plugins=stars.py$"):
        evaluate_command([f"run={run}"])
    code.write_text(CODE + "\n")
    with pytest.raises(UserError, match=r"stars.py: changed since run=.* was done; restore the file"):
        evaluate_command([f"run={run}", f"plugins={code}"])


def test_changed_code_is_another_run(own, tmp_path, runs_folder):
    assert train_command([*own, *SHORT]) == 0 == train_command([*own, *SHORT])
    assert len(list_runs(runs_folder)) == 1
    (tmp_path / "stars.py").write_text(CODE.replace('"quadratic"', '"linear"'))
    assert train_command([*own, *SHORT]) == 0
    assert len(list_runs(runs_folder)) == 2


def test_an_own_experiment_gives_its_report(own, runs_folder, capsys):
    words = ["experiment=mine", *own[:3], own[4], *SHORT]
    assert sweep_command(words) == 0
    report = capsys.readouterr().out
    assert "My own table" in report and "Dual LoRA" in report and len(list_runs(runs_folder)) == 2
    assert sweep_command([*words, "run=false"]) == 0


def test_a_run_of_own_code_troubles_no_other_report_of_its_study(own, runs_folder, capsys):
    assert train_command([*own, *SHORT, "study=baselines"]) == 0
    (run,) = list_runs(runs_folder)
    words = ["experiment=baselines", "scale=smoke", "study=baselines", "run=false"]
    assert sweep_command(words) == 0 and "not read" not in "".join(capsys.readouterr())
    (run / "config.yaml").write_text("seed: 3\n")  # a damaged one does
    assert sweep_command(words) == EXIT_USER and f"not read: {run.name}" in capsys.readouterr().err


def test_code_and_settings_files_are_found_in_the_processes_of_a_launcher(own, runs_folder, capfd):
    """An empty field that the method's own file has is no part of a run's name."""
    words = [*own, *SHORT, "method=lora_mlp"]
    assert train_command([*words, "-m", "seed=0,1", "hydra/launcher=workstation"]) == 0, capfd.readouterr().err
    assert len(list_runs(runs_folder)) == 2 == len(list(runs_folder.glob("adhoc/*")))
    assert train_command([*words, "seed=1"]) == 0 and len(list_runs(runs_folder)) == 2


def test_a_package_and_an_installed_module_are_code_too(own, tmp_path, monkeypatch):
    package = write_files(tmp_path / "stars", {"__init__.py": "from .own import task\n", "own.py": CODE})
    (tmp_path / "stars.py").unlink()
    take_outside_words([f"plugins={package}"])
    first = tasks.plugins["stars"]
    assert tasks.load("stars").name == "stars" and first.path == package
    (package / "own.py").write_text(CODE + "\n")
    take_outside_words([f"plugins=[{package}]"])
    assert tasks.plugins["stars"].sha256 != first.sha256
    monkeypatch.syspath_prepend(tmp_path)
    write_files(tmp_path / "mine_installed", {"__init__.py": "", "stars.py": CODE})
    take_outside_words(["plugins=mine_installed.stars"])
    assert tasks.plugins["stars"].path == tmp_path / "mine_installed/stars.py"


def test_from_anywhere_as_the_user_types_it(own, tmp_path, runs_folder):
    """In a process of its own, with a relative path, and --cfg job shows the settings."""
    words = [word.replace(f"{tmp_path}/", "") for word in own]
    command = [sys.executable, str(ROOT / "train.py"), *words, "method=lora_mlp"]
    env = os.environ | {"PYTHONPATH": ""}
    shown = subprocess.run([*command, "--cfg", "job"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert yaml.safe_load(shown.stdout)["method"]["name"] == "lora_mlp", shown.stderr
    done = subprocess.run([*command, *SHORT], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "kappa" in done.stdout, done.stderr


# Safety.

IMPORTS = {"exec_module", "import_module", "spec_from_file_location", "module_from_spec", "run_path"}
IMPORTER = "dual_lora/lab/config/outside/plugins.py"
FROM_HERE = re.compile(r"f?['\"](dual_lora|tasks|\{__name__\})\.")


def imports_from_elsewhere(call: ast.Call) -> bool:
    """Return whether a call imports by name, and not surely from this repository."""
    named = ast.unparse(call.func).rpartition(".")[2] in IMPORTS
    return named and not FROM_HERE.match(ast.unparse(call.args[0]))


def test_only_one_file_imports_code_from_elsewhere():
    for path in [*ROOT.glob("*.py"), *(ROOT / "dual_lora").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")]:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        elsewhere = any(map(imports_from_elsewhere, calls))
        assert elsewhere == (str(path.relative_to(ROOT)) == IMPORTER), path


@pytest.mark.parametrize("key", ["plugins", "task.plugins", "+task.options.plugins"])
def test_no_settings_file_and_no_record_names_code(key, own, tmp_path, runs_folder):
    trap = tmp_path / "trap.py"
    trap.write_text(f"import os\nos.mkdir({str(tmp_path / 'code-was-run')!r})\n" + CODE)
    folder = tmp_path / "settings"
    changed = FILES["experiment/mine.yaml"].replace("task=stars", f"task=stars, {key}={trap}")
    write_files(folder, {"experiment/mine.yaml": changed})
    with pytest.raises(UserError):
        sweep_command(["experiment=mine", *own[:3], own[4], *SHORT])
    load_choice_file.cache_clear()
    compose_choices.cache_clear()
    write_files(folder, {"task/stars.yaml": FILES["task/stars.yaml"] + f"plugins: {trap}\n"})
    with pytest.raises(UserError):
        train_command([*own, *SHORT])
    assert not (tmp_path / "code-was-run").exists()


def test_a_record_s_code_is_not_run_unless_it_is_named(own, tmp_path, runs_folder):
    assert train_command([*own, *SHORT]) == 0
    (run,) = list_runs(runs_folder)
    (tmp_path / "stars.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'code-was-run')!r})\n" + CODE)
    with pytest.raises(UserError):
        evaluate_command([f"run={run}"])
    assert not (tmp_path / "code-was-run").exists()


def test_what_is_empty_in_an_own_file_counts(tmp_path, runs_folder):
    """PEFT's default of this field is not empty, and neither need be that of an option."""
    names = {}
    for name, line in (("a", ""), ("b", "  init_lora_weights: null\n")):
        content = f"name: mine\nlr: 1e-3\nrank: 4\nalpha: 4\npeft:\n  peft_type: LORA\n  r: ${{method.rank}}\n{line}"
        write_files(tmp_path / name, {"method/mine.yaml": content})
        words = take_outside_words(["--config-dir", str(tmp_path / name), "method=mine", "model=tiny-roberta"])
        names[name] = compute_identity(load_settings([*words, "task=demo/sentiment"]))
    assert names["a"] != names["b"]
    code = CODE.replace('label="label"', 'label="label", words=["great"]')
    assert code != CODE
    (tmp_path / "stars.py").write_text(code)
    write_files(tmp_path / "c", {"task/stars.yaml": FILES["task/stars.yaml"]})
    own = ["model=tiny-roberta", "task=stars"]
    words = take_outside_words([f"plugins={tmp_path / 'stars.py'}", "--config-dir", str(tmp_path / "c"), *own])
    plain, empty = (
        select_identity_settings(load_settings([*words, *more])) for more in ([], ["+task.options.words=[]"])
    )
    assert plain != empty


def test_a_misspelt_field_of_a_family_is_refused(tmp_path):
    write_files(tmp_path, {"family/mine.yaml": "types: [mine]\nadpt: [q]\nroles: {q: query, k: key}\n"})
    take_outside_words(["--config-dir", str(tmp_path)])
    said = "family/mine.yaml: adpt: a family has types, generates, roles, head, adapt. Did you mean adapt[?]$"
    with pytest.raises(UserError, match=said):
        load_families()


# What is wrong.

TASK = FILES["task/stars.yaml"]
# fmt: off
WRONG = {
    "no folder": ({}, "--config-dir HERE/none", "--config-dir HERE/none: no such folder"),
    "no word after the flag": ({}, "--config-dir", "--config-dir model=tiny-roberta: no such folder"),
    "nothing after the flag": ({}, "--config-dir=", "--config-dir: needs a folder; write --config-dir DIR"),
    "two folders": ({"x/task/a.yaml": TASK}, "--config-dir=HERE/x -cd HERE/x", "-cd: given twice; drop one"),
    "an empty folder": ({"x/a.txt": ""}, "--config-dir HERE/x", "x: no settings in it; settings are in --config-dir DIR as DIR/GROUP/NAME.yaml"),
    "a group misspelt": ({"x/tasks/a.yaml": TASK}, "--config-dir HERE/x", "x/tasks/a.yaml: not read; settings are in --config-dir DIR as DIR/GROUP/NAME.yaml, GROUP one of model, task, method, hardware, experiment, family. Did you mean task?"),
    "a launcher": ({"x/hydra/launcher/a.yaml": "_target_: os.system"}, "--config-dir HERE/x", "x/hydra/launcher/a.yaml: not read"),
    "no group": ({"x/a.yaml": TASK}, "--config-dir HERE/x", "x/a.yaml: not read; settings are in"),
    "another ending": ({"x/task/a.yml": TASK}, "--config-dir HERE/x", "x/task/a.yml: not read; name it a.yaml"),
    "a name that is taken": ({"x/method/lora.yaml": ""}, "--config-dir HERE/x", "x/method/lora.yaml: conf/method has a lora, too; rename it"),
    "another name inside": ({"x/method/mine.yaml": "name: lora\nlr: 1\npeft: null\n"}, "--config-dir HERE/x method=mine", "x/method/mine.yaml: name: lora; write name: mine, as the file is called"),
    "a YAML that is none": ({"x/method/mine.yaml": "name: [\n"}, "--config-dir HERE/x method=mine", "x/method/mine.yaml: line 2: did not find expected node content; fix the file"),
    "the environment": ({"x/method/mine.yaml": "name: mine\nlr: ${oc.env:LR}\npeft: null\n"}, "--config-dir HERE/x method=mine", "method.lr: Unsupported interpolation type oc.env; write the value itself"),
    "an unknown field": ({"x/method/mine.yaml": "name: mine\nlr: 1\nrnak: 2\n"}, "--config-dir HERE/x method=mine", "method.rnak: not among the method's"),
    "no file": ({}, "plugins=HERE/none.py", "plugins=HERE/none.py: no such file; give a file FILE.py, the folder of a package"),
    "no module": ({}, "plugins=no_such_module_here", "plugins=no_such_module_here: no such file, and no module of that name"),
    "no package": ({"x/a.py": ""}, "plugins=HERE/x", "plugins=HERE/x: no __init__.py there, so it is not a package"),
    "several without a list": ({}, "plugins=a.py,b.py", "plugins=a.py,b.py: not of the form plugins=FILE.py or plugins=[FILE.py,FILE.py]"),
    "nothing": ({}, "plugins=", "plugins=: not of the form plugins=FILE.py"),
    "a name that Python has not": ({"my-task.py": CODE}, "plugins=HERE/my-task.py", "my-task is not a Python name; rename it"),
    "a name of ours": ({"glue.py": CODE}, "plugins=HERE/glue.py", "glue is the name of a task here; rename it"),
    "a name twice": ({"a/stars.py": CODE, "b/stars.py": CODE}, "plugins=[HERE/a/stars.py,HERE/b/stars.py]", "called stars like HERE/a/stars.py; rename one"),
    "no Python": ({"stars.py": "def task(:\n"}, "plugins=HERE/stars.py", "stars.py: cannot be imported (SyntaxError: invalid syntax (stars.py, line 1); HERE/stars.py, line 1); fix it"),
    "an import that fails": ({"stars.py": "\nimport no_such_module_here\n"}, "plugins=HERE/stars.py", "cannot be imported (ModuleNotFoundError: No module named 'no_such_module_here'; HERE/stars.py, line 2)"),
    "an import that exits": ({"stars.py": "raise SystemExit(3)\n"}, "plugins=HERE/stars.py", "cannot be imported (SystemExit: 3; HERE/stars.py, line 1)"),
    "no function": ({"stars.py": "", "x/task/stars.yaml": TASK}, "plugins=HERE/stars.py --config-dir HERE/x task=stars", "stars.py: defines no function task(subset, **options); add it"),
    "no task": ({"stars.py": "def task(subset, text='', label=''):\n    return 5\n", "x/task/stars.yaml": TASK}, "plugins=HERE/stars.py --config-dir HERE/x task=stars", "stars.py: task() returns '5'; return a subclass of tasks.base.Task"),
    "half a task": ({"stars.py": "import tasks.base\ndef task(subset, text='', label=''):\n    return tasks.base.Task()\n", "x/task/stars.yaml": TASK}, "plugins=HERE/stars.py --config-dir HERE/x task=stars", "stars.py: its task has no name, version, form, metric; set it"),
    "a task that fails": ({"stars.py": "def task(subset, text='', label=''):\n    return 1 / 0\n", "x/task/stars.yaml": TASK}, "plugins=HERE/stars.py --config-dir HERE/x task=stars", "stars.py: its function task(subset, **options) fails (ZeroDivisionError('division by zero')); fix it"),
    "a task without its settings": ({"stars.py": CODE}, "plugins=HERE/stars.py task=stars", "task=stars: HERE/stars.py needs its settings, task/stars.yaml in a folder given by --config-dir DIR"),
    "a task without its code": ({"x/task/stars.yaml": TASK}, "--config-dir HERE/x task=stars", "task.name=stars: no such task; take task=NAME, one of those in conf/task/, or give the file of your own task as plugins=FILE.py"),
    "an option it has not": ({"stars.py": CODE, "x/task/stars.yaml": TASK}, "plugins=HERE/stars.py --config-dir HERE/x task=stars +task.options.weights=2", "task.options.weights: stars has no such option; it has text, label"),
}
# fmt: on


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_folder_or_file_is_answered_in_one_line(what, tmp_path, runs_folder):
    files, words, said = WRONG[what]
    write_files(tmp_path, files)
    with pytest.raises(UserError) as caught:
        train_command([*words.replace("HERE", str(tmp_path)).split(), "model=tiny-roberta", *SHORT])
    message = str(caught.value).replace(str(tmp_path), "HERE")
    assert said in message and len(message.splitlines()) == 1, message


def test_eval_needs_no_folder(tmp_path):
    with pytest.raises(UserError, match="^--config-dir: a record holds every setting of its run; drop it"):
        evaluate_command(["run=x", "--config-dir", "x"])


def test_a_field_misspelt_in_a_file_is_told_with_the_file(tmp_path, runs_folder, capsys):
    peft = "{peft_type: LORA, r: 4, lora_alfa: 16}"
    write_files(tmp_path, {"x/method/mine.yaml": f"name: mine\nlr: 1e-3\npeft: {peft}\n"})
    words = ["--config-dir", str(tmp_path / "x"), "method=mine", *SHORT]
    assert train_command(words) == EXIT_USER
    said = f"{tmp_path}/x/method/mine.yaml: peft.lora_alfa: LORA has no such field. Did you mean lora_alpha?"
    assert said in capsys.readouterr().err


def test_what_one_command_named_the_next_does_not_know(own, runs_folder):
    take_outside_words(own)
    assert paths.own_folders and tasks.plugins
    take_outside_words([])
    assert not paths.own_folders and not tasks.plugins and not compose_choices.cache_info().currsize
    with pytest.raises(UserError, match=r"^task=stars: no such task"):
        train_command(own[3:])


def test_the_names_of_groups_are_those_of_conf():
    from dual_lora.lab.config.outside.words import FOLDERS

    assert {path.name for path in paths.CONF.iterdir() if path.is_dir()} == {*FOLDERS, "scale", "hydra"}
    assert re.fullmatch(r"\w+", FOLDERS[0])
