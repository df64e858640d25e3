"""The command line: every mistake one line with a mend, before torch is imported; every shipped choice composes."""

import subprocess
import sys
from dataclasses import asdict

import pytest
import yaml

from dual_lora.lab.commands.train import check_command
from dual_lora.lab.config.compose import GROUPS, list_choices, load_settings
from dual_lora.lab.config.recorded import load_recorded_settings
from dual_lora.lab.errors import UserError
from dual_lora.lab.record.identity import compute_identity, select_identity_settings
from tests.support.places import ROOT

ENCODER = ["model=tiny-roberta", "task=demo/sentiment"]

MISTAKES = {
    "mehtod=lora": "mehtod: no such setting. Did you mean method?",
    "method=lorra": "method=lorra: no such method. Did you mean lora?",
    "model=lama3-8b": "model=lama3-8b: no such model. Did you mean llama3-8b?",
    "method=adalora": "method=adalora: not offered, because its ranks follow a schedule that needs a call after every",
    "task=sst2": "task=sst2: no such task. Did you mean glue/sst2?",
    "task=glue/sst": "task=glue/sst: no such task. Did you mean glue/sst2?",
    "method.rnk=8": "method.rnk: no such setting. Did you mean method.rank?",
    "train.epoch=2": "train.epoch: no such setting. Did you mean train.epochs?",
    "+train.warmup=3": "train.warmup: no such setting.",
    "train.lr=fast": "train.lr=fast: must be a number",
    "method.rank=2.5": "method.rank=2.5: must be a whole number or null",
    "train={lr:fast}": "train.lr=fast: must be a number",
    "deterministic=maybe": "deterministic=maybe: must be true or false",
    "train=5": "train: a group of settings; set one of them",
    "model.roles=3": "model.roles: must be a mapping",
    "train.lr=0": "train.lr=0.0: must be positive",
    "train.lr=null": "train.lr: must be a number",
    "train.max_steps=0": "train.max_steps=0: must be positive",
    "seed=-1": "seed=-1: must not be negative",
    "study=../x": "study=../x: only letters",
    "train.schedule=linera": "train.schedule=linera: not one of linear, cosine, constant, constant_with_warmup. Did",
    "wandb.mode=onlin": "wandb.mode=onlin: not one of online, offline, disabled. Did you mean online?",
    "model.dtype=float8": "model.dtype=float8: not one of float32",
    "model.adapt=[q,z]": "model.adapt: tiny-roberta has no role 'z'",
    "model.path=/nowhere": "model.path=/nowhere: no config.json, no weights",
    "method.rank=1": "method.rank=1: dual_lora shares it between two groups of at least 1 each; take 2 or more",
    "method.r1=4": "method.r1 and method.r2: give both or neither",
    "method.peft.zzz=1": "method.peft.zzz: not among the method's; write +method.peft.zzz=VALUE to add it",
    "~method": "~method: settings cannot be removed",
    "train={epochs:3,max_steps:2}": "train.epochs=3: train.max_steps=2 is used instead; drop one",
    "experiment=demo": "experiment: experiments are run by sweep.py",
    "rank": "rank: not of the form KEY=VALUE",
}


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        check_command(list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("override", MISTAKES)
def test_mistake_is_one_line_with_the_mend(override):
    base = [word for word in ENCODER if word.partition("=")[0] != override.partition("=")[0]]
    message, expected = refused(*base, override), MISTAKES[override]
    assert message.startswith(expected), message


def test_settings_of_another_method_are_refused():
    assert refused(*ENCODER, "method=lora", "method.magnitude_ratio=0.3") == (
        "method.magnitude_ratio=0.3: method lora has no magnitude_ratio; drop it"
    )
    assert "method full has no adapter" in refused(*ENCODER, "method=full", "method.rank=4")


def test_ranks_of_the_two_groups():
    ours = load_settings([*ENCODER, "method.r1=4", "method.r2=12"]).method
    assert (ours.rank, ours.magnitude_ratio, ours.peft["r"]) == (16, 0.25, 16)
    twice = refused(*ENCODER, "method.rank=8", "method.r1=4", "method.r2=12")
    assert twice == "method.rank=8: method.r1 and method.r2 make it 16; drop one"


def test_a_model_that_writes_no_text_cannot_do_a_generation_task():
    message = refused("model=tiny-roberta", "task=demo/restaurants")
    assert "tiny-roberta writes no text; take another task, such as task=classification, or a model" in message
    assert "tiny-llama" in message


def test_a_sweep_needs_the_multirun_flag():
    assert refused("seed=0,1", "method=lora,dora") == "4 runs asked for: add -m to run them all"
    jobs = check_command(["-m", "method=lora,dora", "seed=0,1"])
    assert [(run.settings.method.name, run.settings.seed) for run in jobs] == [
        ("lora", 0),
        ("lora", 1),
        ("dora", 0),
        ("dora", 1),
    ]


def test_one_bad_value_in_a_sweep_stops_it_before_the_first_run():
    assert "Did you mean tiny-llama?" in refused("-m", "model=tiny-lama,tiny-gpt2")


@pytest.mark.parametrize("model", list_choices("model"))
@pytest.mark.parametrize("method", list_choices("method"))
def test_every_model_composes_with_every_method(model, method):
    found = load_settings([f"model={model}", "task=glue/rte", f"method={method}"])
    assert (found.model.name, found.method.name) == (model, method)


@pytest.mark.parametrize("task", list_choices("task"))
def test_every_task_composes(task):
    assert load_settings(["model=tiny-llama", f"task={task}"]).task.name == task


def python(code: str, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT, timeout=1500)


CODE_AND_TORCH = """
import runpy, sys
script = sys.argv[1]
sys.argv = sys.argv[1:]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as error:
    print("exit", error.code, "torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("script", "argument", "message"),
    [
        ("train.py", "method=dualora", "train.py: method=dualora: no such method. Did you mean dual_lora?"),
        ("train.py", "train.lr=fast", "train.py: train.lr=fast: must be a number"),
        ("train.py", "data_dir=/nowhere task=glue/rte", "train.py: data_dir=/nowhere: no such folder"),
        ("eval.py", "run=/nowhere", "eval.py: run=/nowhere: no config.yaml there"),
        ("eval.py", "", "eval.py: run=runs/STUDY/ID is needed"),
        ("sweep.py", "", "sweep.py: experiment=NAME is needed"),
        ("eval.py", "rum=x", "eval.py: rum: no such setting of eval.py. Did you mean run?"),
    ],
)
def test_a_mistake_ends_with_code_2_before_torch_is_imported(script, argument, message):
    done = python(CODE_AND_TORCH, script, *argument.split())
    assert done.stderr.startswith(message), done.stderr
    assert done.stderr.splitlines()[-1] == "exit 2 False"
    assert len(done.stderr.splitlines()) == 2


def test_help_shows_every_choice_and_lines_to_paste():
    shown = python(CODE_AND_TORCH, "train.py", "--help").stdout
    for group in GROUPS:
        for choice in list_choices(group):
            assert choice.rsplit("/", 1)[-1] in shown
    assert "python train.py -m method=lora,lora_plus,dora,dual_lora seed=0,1,2" in shown


def test_identity_is_a_hash_of_typed_facts(tmp_path):
    def name(*overrides):
        return compute_identity(load_settings([*ENCODER, *overrides]))

    plain = name()
    assert plain.startswith("tiny-roberta_demo-sentiment_dual_lora_s0_")
    assert plain == name("method.alpha=16") == name("method.alpha=16.0") == name("train.lr=2e-3")
    assert plain == name("wandb.mode=disabled", "train.save_steps=7", "train.log_steps=3", "study=other", "force=true")
    different = ["seed=1", "method.alpha=8", "train.lr=1e-3", "eval.batch_size=8", "train.max_steps=9", "method=lora"]
    assert len({plain, *(name(d) for d in different)}) == 1 + len(different)


def test_an_empty_peft_field_renames_a_run_unless_it_says_what_leaving_it_out_says():
    """PEFT's default of a field may be another value than null or an empty list."""

    def name(*overrides):
        return compute_identity(load_settings([*ENCODER, *overrides]))

    assert name() == name("+method.peft.target_modules=null") == name("+method.peft.modules_to_save=null")
    assert name() == name("method.r1=null", "method.r2=null")
    words = ["+method.peft.modules_to_save=[]", "+method.peft.target_modules=[]", "+method.peft.init_weights=null"]
    assert len({name(), *map(name, words)}) == 4
    assert name("method=lora") != name("method=lora", "+method.peft.init_lora_weights=null")
    assert name("method=head_only") != name("method=head_only", "+method.peft.task_type=null")


def test_what_a_methods_file_has_empty_is_no_part_of_the_identity():
    """So runs of these methods kept their names when empty fields of others began to count."""
    for method, fields in {
        "dual_lora": {"r1", "r2", "scale_warmup_steps"},
        "none": {"task_type", "modules_to_save"},
    }.items():
        settings = load_settings([*ENCODER, f"method={method}"])
        assert fields <= settings.method.peft.keys()
        assert not fields & select_identity_settings(settings)["method"]["peft"].keys()


def test_a_record_from_before_a_setting_existed_is_read_as_it_was_run(tmp_path):
    chosen = asdict(load_settings([]))
    del chosen["init_from"], chosen["train"]["group_by_length"], chosen["task"]["stop"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(chosen))
    read = load_recorded_settings(tmp_path)
    assert (read.init_from, read.train.group_by_length, read.task.stop) == (None, None, [])
