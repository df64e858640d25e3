"""Plans: parameters beside the published ones, memory and operations against a real step, refusals."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train  # noqa: F401 - sets the lazy import the command line uses
from dual_lora import paper
from dual_lora.analysis.memory import measure_kept_bytes
from dual_lora.lab.commands.sweep import sweep_command
from dual_lora.lab.commands.train import train_command
from dual_lora.lab.config.compose import list_choices, load_settings
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.adapt import attach_method, count_parameters
from dual_lora.lab.model.load import load_model
from dual_lora.lab.record.run import Run
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.plans import REPORTED, plan_row
from dual_lora.lab.train.meta_step import build_meta_model
from dual_lora.lab.train.plan import compute_plan, count_training_rows, estimate_memory
from tests.support.places import GOLDEN
from tests.support.small_runs import plan_run

MODELS, METHODS = list_choices("model"), list_choices("method")
TABLE = Path(paper.FOLDER) / "PARAMETERS.md"
PUBLISHED = {"dora_table1_commonsense": "commonsense", "lora_table2_glue": "glue/rte", "lora_table3_e2e": "e2e"}


def planned(*overrides: str) -> dict:
    return compute_plan(load_settings([*overrides, "plan=true"]))


def task_for(model: str) -> str:
    return "e2e" if load_settings([f"model={model}", "task=glue/rte"]).model.generates else "glue/rte"


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_planned(model):
    found = planned(f"model={model}", f"task={task_for(model)}", "method=dual_lora")
    assert found["modules"] and 0 < found["adapter_parameters"] <= found["trainable_parameters"] < found["parameters"]
    assert found["flops"]["backward"] > found["flops"]["forward"] / 2 > 0 and found["steps"] > 0 and found["hours"] > 0
    assert 0 < found["memory"]["activations"] < found["memory"]["peak"]


def test_a_small_plan_is_printed_in_small_units(runs_folder, capsys):
    words = ["model=tiny-roberta", "task=demo/sentiment", "train.max_steps=2", "plan=true"]
    assert train_command(words) == 0
    said = capsys.readouterr().out
    assert " MB a device: weights " in said and " GFLOP a device" in said and " s of training on" in said
    assert " 0.00," not in said and " 0 s" not in said
    assert train_command(["-m", *words, "seed=0,1"]) == 0
    assert "< 0.01" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_planned(method):
    try:
        found = planned("model=llama3-8b", "task=commonsense", f"method={method}")
    except UserError as error:  # with nothing to train on a task without a head
        assert method not in COMPARED and "\n" not in str(error)
        return
    assert found["parameters"] > 8e9
    assert (found["trainable_percent"] == 100) == (load_settings([f"method={method}"]).method.peft is None)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_every_model_is_planned_with_every_method(model, method):
    try:
        found = planned(f"model={model}", f"task={task_for(model)}", f"method={method}")
    except UserError as error:  # a method that does not fit the model, or has nothing to train on it
        assert method not in COMPARED and "\n" not in str(error)
    else:
        assert found["parameters"] > found["trainable_parameters"] >= 0 or method == "full"


def test_adapters_of_a_rank_train_alike_and_dora_one_vector_more():
    lora, dual, dora = (
        planned("model=llama3-8b", "task=commonsense", f"method={m}") for m in ("lora", "dual_lora", "dora")
    )
    assert lora["trainable_parameters"] == dual["trainable_parameters"] == 28_311_552
    assert dora["trainable_parameters"] - lora["trainable_parameters"] == 32 * (4096 + 2 * 1024 + 14336 + 4096)


# The methods this repository compares: of these, and of no other, plans promise every operation.
COMPARED = [m for m in METHODS if (GOLDEN / f"{m}.json").is_file()]


@pytest.mark.parametrize("method", COMPARED)
@pytest.mark.parametrize(
    ("model", "dtype"), [("tiny-llama", "float32"), ("tiny-llama", "bfloat16"), ("tiny-roberta", "float32")]
)
def test_a_plan_is_what_a_real_step_takes(model, dtype, method):
    overrides = [f"model={model}", f"task=demo/{'restaurants' if model == 'tiny-llama' else 'sentiment'}"]
    overrides += [f"method={method}", f"model.dtype={dtype}", "train.batch_size=4", "task.max_length=64"]
    chosen = load_settings(overrides)
    task = load_task(chosen)
    found = compute_plan(chosen)
    base, _ = load_model(chosen, task)
    adapted = attach_method(base, chosen, task.form).train()
    ids = torch.randint(5, 50, (4, 64))
    labels = ids if task.form == "generation" else ids[:, 0] % 2
    counter = FlopCounterMode(display=False)

    @torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")  # as the Trainer
    def step():
        loss = adapted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        return loss.backward

    with counter:
        kept = measure_kept_bytes(adapted, step)
    # torch counts no attention on a CPU: two products forward, five backward, of 2 tokens^2 hidden each
    attention = 14 * 4 * 64**2 * base.config.hidden_size * base.config.num_hidden_layers
    assert found["flops"]["step"] == counter.get_total_flops() + attention
    held = found["memory"]["activations"] + found["memory"]["copies"]
    assert held == pytest.approx(kept, rel=0.05 if dtype == "float32" else 0.1)
    assert (found["memory"]["copies"] > 0) == (method == "full" and dtype == "bfloat16")
    assert found["memory"]["weights"] == sum(p.nbytes for p in adapted.parameters())


def test_sharding_divides_what_it_shards_and_a_larger_batch_keeps_more():
    size = {"frozen": 720, "trained": 80, "copies": 0, "gathered": 200}
    one, full = estimate_memory(size, 1000, 1, "none"), estimate_memory(size, 1000, 8, "full")
    copies = estimate_memory(size, 1000, 8, "replicas")
    assert copies == one | {"gradients": 160, "reserve": 212, "peak": 2332}
    assert one["temporaries"] == 0 and estimate_memory(size, 10, 1, "none")["temporaries"] == 70
    assert (full["weights"], full["gradients"], full["optimizer"]) == (90 + 80, 80, 160)  # an adapter is whole
    assert full["activations"] == one["activations"] == 1000 and full["gathered"] == 200
    assert one["peak"] == pytest.approx(1.1 * (800 + 80 + 160 + 1000))


def test_what_is_trained_in_full_is_shared_out_and_copied_in_16_bits_where_it_is_not():
    size = {"frozen": 0, "trained": 800, "copies": 300, "gathered": 200}
    one, full = estimate_memory(size, 100, 1, "none"), estimate_memory(size, 100, 8, "full")
    assert (one["weights"], one["copies"], one["temporaries"]) == (800, 300, 400)
    assert (full["weights"], full["gradients"], full["optimizer"], full["copies"]) == (100, 100, 200, 0)


def test_rows_set_apart_are_not_planned_to_be_trained_on():
    chosen = ["model=roberta-base", "task=glue/rte", "method=lora", "plan=true"]
    rows = [
        count_training_rows(s, load_task(s))[0] for s in map(load_settings, (chosen, [*chosen, "eval.holdout=500"]))
    ]
    assert rows == [2490, 1990]


COMMONSENSE = ["model=llama3-8b", "task=commonsense", "method=lora", "plan=true"]
HELD_OUT = "+task.options.scored=held_out"


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ([], 170_420),
        (["task.options.train=15k"], 15_000),
        (["task.options.train=15k", "task.train_rows=9000"], 9_000),
        ([HELD_OUT], 169_420),
        ([HELD_OUT, "train.max_examples=64"], 64),
        ([HELD_OUT, "task.validation_rows=20"], 169_400),
    ],
)
def test_rows_are_those_that_the_options_give(words, rows):
    chosen = load_settings([*COMMONSENSE, *words])
    found, source, fewer = count_training_rows(chosen, load_task(chosen))
    assert (found, source) == (rows, "the task's configuration")
    assert bool(fewer) == (HELD_OUT in words and rows > 64)


def plan_lines(words: list[str], capsys) -> dict[str, str]:
    """Return what a plan prints, by the word that heads each line."""
    assert train_command(words) == 0
    return {line[:9].strip(): line[9:] for line in capsys.readouterr().out.splitlines()}


def test_rows_that_only_the_data_can_count_are_an_upper_bound(runs_folder, capsys):
    words = ["model=tiny-llama", *COMMONSENSE[1:], HELD_OUT]
    shown = plan_lines(words, capsys)
    assert shown["rows"].startswith("at most 169,420: copies of ") and shown["rows"].endswith(
        "data_dir=DIR to count them"
    )
    assert shown["time"].startswith("at most 31,767 steps, ")
    shown = plan_lines([*words, "train.max_steps=3"], capsys)
    assert "rows" not in shown and shown["time"].startswith("3 steps, ")


@pytest.mark.parametrize(
    ("method", "adapts"),
    [("full", "all weights"), ("head_only", "no module"), ("lora", "3 query"), ("none", "no module")],
)
def test_a_plan_says_what_trains(method, adapts, runs_folder, capsys):
    words = ["model=tiny-roberta", "task=demo/sentiment", f"method={method}", "plan=true"]
    shown = plan_lines(words, capsys)
    (file,) = runs_folder.glob("adhoc/*/plan.json")
    found = json.loads(file.read_text())
    assert shown["adapts"].startswith(adapts)
    assert (shown["time"] == "none, nothing trains") == (method == "none") == ("step" not in shown)
    assert (found["steps"] == found["hours"] == 0) == (method == "none")
    assert train_command(["-m", *words, "seed=0,1"]) == 0
    assert (capsys.readouterr().out.splitlines()[-1].split()[-3:-1] == ["0", "0.00"]) == (method == "none")


def test_no_hours_are_planned_in_a_sweep_where_nothing_trains():
    settings = load_settings(["model=tiny-roberta", "task=demo/sentiment", "method=none", "plan=true"])
    row = plan_row(Experiment.load("cost", "smoke"), "Base", REPORTED, settings, {})
    assert row["steps"] == row["hours"] == row["device_hours"] == 0 and not row["refused"]


def test_train_prints_and_writes_a_plan_and_loads_nothing(runs_folder, capsys, monkeypatch):
    words = ["model=llama3-8b", "task=commonsense", "method=lora", "method.rank=32", "plan=true"]
    monkeypatch.setattr("dual_lora.lab.model.adapt.load_model", lambda *a: pytest.fail("a model was loaded"))
    assert train_command(words) == 0
    shown = capsys.readouterr().out
    assert "56,623,104 of 8,086,884,352 (0.70 %)" in shown and "0.70 % (dora_table1_commonsense)" in shown
    (file,) = runs_folder.glob("adhoc/llama3-8b_commonsense_lora_s0_*/plan.json")
    found = json.loads(file.read_text())
    assert found["steps"] == 31_956 and found["trainable_parameters"] == 56_623_104
    assert {"weights", "gradients", "optimizer", "activations", "peak"} <= set(found["memory"])


@pytest.mark.parametrize(
    ("overrides", "mend"),
    [
        (["model=llama3-8b", "method=full"], "would fit: hardware.sharding=full hardware.devices=4 (for 4 times"),
        (["model=llama3-8b", "train.batch_size=64"], "would fit: train.batch_size=32 train.accumulation=2, or "),
        (["model=llama3-70b-instruct"], "hardware.sharding=full hardware.devices="),
        (
            ["model=llama3-8b", "method=full", "hardware.devices=4", "hardware.sharding=replicas"],
            "hardware.sharding=full hardware.devices=4",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_with_what_would(overrides, mend, runs_folder, capsys):
    overrides = [*overrides, "task=commonsense"]
    with pytest.raises(UserError, match="a100-80gb has 80; would fit: ") as error:
        plan_run(Run.prepare(load_settings([*overrides, "plan=true"])))
    assert mend in str(error.value)
    for option in str(error.value).partition("would fit: ")[2].split(", or "):
        proposed = option.partition(" (for ")[0].split()
        plan_run(Run.prepare(load_settings([*overrides, "plan=true", *proposed])))  # what is proposed does fit
    capsys.readouterr()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hardware.accelerator=tpu"], "hardware.accelerator=tpu: must be one of a100-40gb"),
        (["hardware.devices=8"], "hardware.devices=8 with hardware.sharding=none"),
        (["hardware.sharding=half"], "hardware.sharding=half: not one of none, replicas, full"),
    ],
)
def test_what_cannot_be_planned_is_one_line(overrides, message, runs_folder):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        plan_run(Run.prepare(load_settings([*overrides, "plan=true"])))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=demo/sentiment", "task.head_dropout=0.3"], "task.head_dropout=0.3: a llama has no dropout before its"),
        (["method=lora", "+method.peft.bias=all"], "method.peft.bias=all: tiny-llama has no such bias; drop it"),
        (["method=lora", "+method.peft.target_parameters=[nothing.weight]"], "method.peft.target_parameters: 'nothing"),
        (["task=glue/rte", "eval.holdout=2490"], "plan: 2,490 rows are to be set apart, glue/rte has 2,490; set fewer"),
    ],
)
def test_a_plan_refuses_what_the_run_would(overrides, message):
    with pytest.raises(UserError, match=f"^{message}"):
        planned("model=tiny-llama", *overrides)


@pytest.mark.parametrize("given", ["0.25", "null"])
def test_a_plan_takes_a_dropout_that_the_head_has(given):
    assert planned("model=tiny-roberta", "task=demo/sentiment", f"task.head_dropout={given}")["steps"] > 0


def test_plans_and_runs_are_not_mixed(runs_folder):
    with pytest.raises(UserError, match="plan: true for all runs or for none"):
        train_command(["-m", "plan=true,false"])


def test_an_experiment_is_planned_and_not_run(runs_folder, capsys, monkeypatch):
    monkeypatch.setattr("dual_lora.lab.commands.train.execute_run", lambda *a: pytest.fail("a run was started"))
    assert sweep_command(["experiment=cost", "scale=smoke", "plan=true"]) == 0
    said = capsys.readouterr().out
    assert "device-hours" in said and (runs_folder / "cost_smoke/plan.csv").is_file()


@pytest.fixture
def short_plans(monkeypatch):
    """A step is planned at once: no model is built."""
    step = {"hours": 1.0, "gb": 1.0, "count_rows": lambda run: 8}
    monkeypatch.setattr("dual_lora.lab.study.plans.compute_step", lambda settings: step)


def read_plan_rows(file: Path) -> list[dict]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_plan_replaces_none_of_more_runs(short_plans, runs_folder, capsys):
    words, plan = ["experiment=cost", "scale=smoke", "plan=true"], runs_folder / "cost_smoke/plan.csv"
    selection = plan.with_name("plan_selection.csv")
    assert sweep_command([*words, "method=lora"]) == 0  # where there is nothing to lose
    few = plan.read_bytes()
    assert sweep_command(words) == 0
    whole = plan.read_bytes()
    assert whole.count(b"\n") > few.count(b"\n") and not selection.exists()
    assert sweep_command([*words, "method=lora"]) == 0 and selection.read_bytes() == few
    capsys.readouterr()
    assert sweep_command([*words, "method=dora"]) == 0 and plan.read_bytes() == whole
    shown = capsys.readouterr()
    assert shown.out.endswith(f"written: {selection}\n")
    assert shown.err == f"{selection}: replaces that of another selection; repeat its command to have it back\n"
    assert sweep_command([*words, "hardware=ddp"]) == 0  # the same runs elsewhere
    assert plan.read_bytes() != whole and {path.name for path in plan.parent.iterdir()} == {plan.name, selection.name}


def test_a_plan_replaces_none_of_another_experiment(short_plans, runs_folder):
    """Two that share the folder of their runs, and two that a study= puts into one."""
    assert sweep_command(["experiment=verdict,truncation", "scale=smoke", "seed=0", "plan=true"]) == 0
    for name in ("verdict", "truncation"):
        rows = read_plan_rows(runs_folder / f"{name}_smoke/plan.csv")
        assert {(row["experiment"], row["scale"]) for row in rows} == {(name, "smoke")}
    assert sweep_command(["experiment=cost,rank_sweep", "scale=smoke", "seed=0", "study=one", "plan=true"]) == 0
    names = ["plan.csv", "plan_rank_sweep_smoke.csv"]
    assert sorted(path.name for path in (runs_folder / "one").iterdir()) == names
    assert {row["experiment"] for row in read_plan_rows(runs_folder / "one/plan.csv")} == {"cost"}


def test_rows_of_a_plan_differ_as_those_of_the_table(short_plans, runs_folder):
    """So that a part of the columns is known for a selection."""
    words, folder = ["experiment=rank_sweep", "scale=smoke", "plan=true"], runs_folder / "rank_sweep_smoke"
    assert sweep_command(words) == 0
    ranks = {row["method.rank"] for row in read_plan_rows(folder / "plan.csv")}
    assert len(ranks) > 1
    assert sweep_command([*words, f"method.rank={min(ranks)}"]) == 0
    assert {row["method.rank"] for row in read_plan_rows(folder / "plan_selection.csv")} == {min(ranks)}


def test_a_model_of_unknown_architecture_is_refused():
    chosen = load_settings(["model=llama3-8b", "task=e2e", "plan=true"])
    unknown = replace(chosen, model=replace(chosen.model, architecture={}))
    with pytest.raises(UserError, match="^model=llama3-8b: .*; give model.path=DIR"):
        compute_plan(unknown)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["model=llama3-70b-instruct", "task=commonsense", "method=dora"], "method=dora starts from the base weights"),
        (["model=gpt2-medium", "task=e2e", "method=lora"], "transformers cannot shard a gpt2; take hardware=ddp"),
    ],
)
def test_a_plan_of_what_cannot_be_sharded_is_refused(overrides, why, runs_folder):
    with pytest.raises(UserError, match=f"^plan: hardware.sharding=full: {why}"):
        plan_run(Run.prepare(load_settings([*overrides, "hardware=fsdp2", "plan=true"])))


def test_no_sharding_is_offered_to_what_cannot_be_sharded(runs_folder):
    large = ["model=deberta-v2-xxlarge", "task=glue/mnli", "method=full", "train.batch_size=64", "task.max_length=512"]
    with pytest.raises(UserError, match="would fit: ") as told:
        plan_run(Run.prepare(load_settings([*large, "model.dtype=float32", "plan=true"])))
    assert "sharding" not in str(told.value)


def parameter_table() -> str:
    lines = ["# Trained weights, counted by `plan=true` beside the published figures", ""]
    lines += ["Without the classification head, which papers do not count. Made by tests/lab/train/test_plan.py.", ""]
    lines += [
        "| model | method | rank | counted | as printed | published | table |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for name, task in PUBLISHED.items():
        for row in paper.load_table(name).rows:
            model, method, rank = (row.keys.get(key) for key in ("model", "method", "rank"))
            printed = row.values["params"].text if "params" in row.values else row.keys.get("params")
            if model not in MODELS or method not in ("lora", "dora") or not printed:
                continue
            for tried in (rank,) if rank else (8, 16):
                chosen = load_settings([f"model={model}", f"task={task}", f"method={method}", f"method.rank={tried}"])
                about = load_task(chosen)
                found = count_parameters(attach_method(build_meta_model(chosen, about), chosen, about.form))
                count = found["adapter_parameters"]
                percent = 100 * count / found["parameters"]
                digits = len(printed.rstrip("M").partition(".")[2])
                ours = f"{count / 1e6:.{digits}f}M" if printed.endswith("M") else f"{percent:.{digits}f}"
                mark = "" if ours == printed else " *"
                line = f"| {model} | {method} | {tried} | {count:,} | {ours}{mark} | {printed} | {name} |"
                if line not in lines:
                    lines.append(line)
    lines += ["", '\\* Not equal: DEVIATIONS.md, "Parameter counts", says why.']
    return "\n".join(lines) + "\n"


def test_counted_parameters_are_the_published_ones():
    found = parameter_table()
    if os.environ.get("DUAL_LORA_GOLDEN") == "write":
        TABLE.write_text(found)
    assert found == TABLE.read_text()
    unequal = {tuple(line.split(" | ")[0:3]) for line in found.splitlines() if " * |" in line}
    assert unequal == {
        ("| llama3-8b", "dora", "16"),
        ("| gpt2-medium", "lora", "4"),
        ("| gpt2-large", "lora", "4"),
        ("| deberta-v2-xxlarge", "lora", "8"),
    }
