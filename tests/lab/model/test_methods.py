"""Any method of PEFT as one YAML: trained, evaluated again, exported and analysed, or refused in one line first."""

import io
import json
import shutil
from contextlib import redirect_stdout

import pytest
import torch
import yaml
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.commands.train import check_command
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.schema import FILLED_FIELDS
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.adapt import attach_method, build_adapter_config, draw_initial_model
from dual_lora.lab.model.load import load_model
from dual_lora.lab.model.merge import explain_unmergeable, merge_adapter
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.train.run import train_run
from dual_lora.lab.weights import analyse as weights_analyse
from dual_lora.tuner.warmup import list_factors

TASKS = {"tiny-roberta": "demo/sentiment", "tiny-llama": "demo/restaurants"}
WRITES = {"tiny-roberta": [], "tiny-llama": ["task.max_new_tokens=4"]}
HEADS = {"tiny-roberta": AutoModelForSequenceClassification, "tiny-llama": AutoModelForCausalLM}
SHORT = ["train.max_steps=2", "train.max_examples=20", "train.batch_size=4", "eval.max_examples=4", "eval.before=false"]
SHORT += ["wandb.mode=disabled", "train.lr=0.01"]
# What a type cannot do without.
NEEDED = {
    "TRAINABLE_TOKENS": {"token_indices": [5, 6]},
    "C3A": {"block_size": 32},
    "VBLORA": {"vector_length": 32, "num_vectors": 16},
    "ROAD": {"group_size": 32},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
}
TYPES = sorted(getattr(kind, "value", kind) for kind in PEFT_TYPE_TO_CONFIG_MAPPING)


@pytest.fixture
def add_method(tmp_path, monkeypatch, runs_folder):
    """A function that adds a method by its YAML alone, in a copy of conf/, and returns the override that takes it."""
    conf = shutil.copytree(paths.CONF, tmp_path / "conf")
    monkeypatch.setattr(paths, "CONF", conf)
    monkeypatch.setattr(weights_analyse, "draw_analysis", lambda *_: None)

    def add(name: str = "planted", **peft) -> str:
        (conf / "method" / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "lr": 1e-3, "peft": peft}))
        return f"method={name}"

    return add


def train(model: str, *overrides: str) -> tuple[Record, dict]:
    run = Run.prepare(load_settings([f"model={model}", f"task={TASKS[model]}", *SHORT, *WRITES[model], *overrides]))
    return run.record, train_run(run)


def try_command(*arguments: str) -> str | None:
    """Return the line with which eval.py refuses; None if it does what it is asked for."""
    try:
        with redirect_stdout(io.StringIO()):
            assert evaluate_command([*arguments]) == 0
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


def check_changes(model: str, record: Record, exported) -> None:
    """Hold dW of the analysis against exported minus original weights."""
    settings = load_settings([f"model={model}", f"task={TASKS[model]}"])
    original, _ = load_model(settings, load_task(settings))
    after = HEADS[model].from_pretrained(exported).state_dict()
    before, found = original.state_dict(), rows_of(record)
    for module, row in found.items():
        dW = (after[f"{module}.weight"].double() - before[f"{module}.weight"].double()).norm()
        size = (dW / before[f"{module}.weight"].double().norm()).item()
        assert row["relative_size"] == pytest.approx(size, rel=1e-3, abs=1e-6), module


def rows_of(record: Record) -> dict[str, dict]:
    return {row["module"]: row for row in json.loads((record.folder / "analysis.json").read_text())["rows"]}


def walk(model: str, kind: str, add_method, tmp_path) -> str:
    """Do everything with one type of PEFT and return how it went."""
    method = add_method("planted", peft_type=kind, **NEEDED.get(kind, {}))
    try:
        record, result = train(model, method)
    except UserError as error:
        assert "\n" not in str(error)
        weights = [*record_folders(tmp_path)]
        assert not weights, "refused after training"
        return "refused"
    assert result["steps"] == 2
    run, out = f"run={record.folder}", tmp_path / "out"
    assert try_command(run) is None, "scores are not reproduced"
    refused, unknown = try_command(run, f"export={out}"), try_command(run, "analyse=true")
    if not result["merged"]:
        assert "cannot be merged into the base weights" in refused and not out.exists()
        return "unmerged"
    assert refused is None
    if unknown is None:
        check_changes(model, record, out)
    else:
        assert "no weight of a role" in unknown and "name the adapted modules in model.roles" in unknown
    return "merged"


def record_folders(tmp_path):
    return tmp_path.glob("runs/*/*/adapter")


@pytest.mark.parametrize(
    ("model", "kind", "outcome"),
    [
        ("tiny-roberta", "LOHA", "merged"),
        ("tiny-roberta", "LILY", "unmerged"),
        ("tiny-llama", "BEFT", "unmerged"),
        ("tiny-llama", "LN_TUNING", "merged"),
        ("tiny-roberta", "POLY", "refused"),
        ("tiny-roberta", "PROMPT_TUNING", "refused"),
        ("tiny-llama", "ADALORA", "refused"),
        ("tiny-roberta", "TRAINABLE_TOKENS", "refused"),
    ],
)
def test_a_method_of_peft_needs_its_yaml_and_nothing_else(model, kind, outcome, add_method, tmp_path):
    assert walk(model, kind, add_method, tmp_path) == outcome


def test_norms_that_train_are_held_in_float32(add_method):
    record, _ = train("tiny-llama", add_method(peft_type="LN_TUNING"), "model.dtype=bfloat16", "train.lr=1e-5")
    weights = load_file(record.folder / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all((weight != weight.bfloat16()).any() for weight in weights.values()), "rounded on the way"
    assert try_command(f"run={record.folder}") is None, "scores are not reproduced"


@pytest.mark.parametrize("form", ["classification", "generation"])
def test_a_method_that_needs_a_task_for_each_row_says_so(form, add_method):
    settings = load_settings([add_method("planted", peft_type="POLY")])
    with pytest.raises(UserError, match=r"method=planted \(POLY\): mixes adapters by the number of the task") as caught:
        build_adapter_config(settings, form)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("model", TASKS)
@pytest.mark.parametrize("kind", TYPES)
def test_every_type_of_peft_ends_well_or_in_one_line_before_training(model, kind, add_method, tmp_path):
    assert walk(model, kind, add_method, tmp_path) in ("merged", "unmerged", "refused")


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4"])
def test_a_start_that_changes_the_base_is_analysed_as_its_weights_say(start, add_method, tmp_path):
    method = add_method("planted", peft_type="LORA", r=4, lora_alpha=4, init_lora_weights=start)
    record, _ = train("tiny-llama", method)
    run = f"run={record.folder}"
    assert try_command(run) is None
    assert try_command(run, f"export={tmp_path / 'out'}") is None and try_command(run, "analyse=true") is None
    check_changes("tiny-llama", record, tmp_path / "out")
    for row in rows_of(record).values():
        assert row["ranks"] == "4" and row["overall_rank"] <= 8  # B A - B0 A0
        product = adapter_product(record, row["module"])
        assert row["relative_size"] < 0.5 * product / 1.0, "the factors' product, which the start took from the base"


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("eva", "starts from activations on training data"),
        ("lora_ga", "starts from gradients on training data"),
        ("corda_kpm", "preprocess_corda"),
    ],
)
def test_a_start_that_needs_data_is_refused(start, message, add_method):
    with pytest.raises(UserError, match=message):
        train("tiny-llama", add_method("planted", peft_type="LORA", init_lora_weights=start))


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("alora_invocation_tokens", [201], "acts after these tokens only"),
        ("kasa_config", {"beta": 1e-4}, "needs terms in the loss"),
        ("monteclora_config", {"num_samples": 2}, "needs terms in the loss"),
    ],
)
@pytest.mark.parametrize("model", TASKS)
def test_a_field_that_leaves_a_part_to_the_caller_is_refused_before_loading(
    model, field, value, reason, add_method, monkeypatch
):
    monkeypatch.setattr("dual_lora.lab.model.adapt.load_model", None)
    method = add_method("planted", peft_type="LORA", **{field: value})
    with pytest.raises(UserError, match=rf"method=planted \(LORA\): method.peft.{field}: {reason}.*; drop it$"):
        train(model, method)


def adapter_product(record: Record, module: str) -> float:
    """Return the size of B A relative to the base weight."""
    factors = load_file(record.folder / "adapter/adapter_model.safetensors")
    A, B = (next(t for n, t in factors.items() if f"{module}.lora_{part}" in n) for part in "AB")
    base = load_file(paths.BUNDLED / "tiny-llama/model.safetensors")[f"{module}.weight"]
    return ((B @ A).norm() / base.norm()).item()


def test_a_merge_that_computes_something_else_is_found(add_method, monkeypatch):
    settings = load_settings(["model=tiny-llama", "task=demo/restaurants", "method=lora"])
    base, _ = load_model(settings, load_task(settings))
    model = attach_method(base, settings, "generation")
    assert explain_unmergeable(model) is None
    layer = type(model.get_base_model().model.layers[0].self_attn.q_proj)
    monkeypatch.setattr(layer, "merge", lambda self, **_: self.merged_adapters.append("default"))
    assert "merged, a layer computes something else" in explain_unmergeable(model)


# Adapted modules whose weights another one uses: GPT-2's head is its embedding; PEFT repeats blocks with their weights.
TIED = ["model=tiny-gpt2", "+model.roles.e=wte", "model.adapt=[e]"]
REPEATED = ["model=tiny-llama", "+method.peft.layer_replication=[[0,2],[1,3]]"]


@pytest.mark.parametrize(
    ("method", "words", "merged"),
    [("lora", TIED, False), ("dual_lora", TIED, True), ("lora", REPEATED, False), ("lora", TIED[:1], True)],
)
def test_a_merge_does_not_change_what_other_modules_compute(method, words, merged):
    settings = load_settings(["task=demo/restaurants", f"method={method}", *words])
    base, _ = load_model(settings, load_task(settings))
    model = attach_method(base, settings, "generation", rows=8).eval()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn(weight.shape)
    for factors in list_factors(model):
        factors.set_update_scale(1.0, ramp=False)
    ids = torch.arange(2, 18)[None]
    before = model(ids).logits
    why = explain_unmergeable(model)
    assert (why is None) == merged and ("shares its weights with another module" in (why or "")) != merged
    assert merge_adapter(model) == merged
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)


def test_the_bare_model_is_scored_without_a_step(runs_folder):
    record, result = train("tiny-roberta", "method=none", "eval.before=true")
    assert result["metrics"] == result["metrics_before"]
    assert (result["steps"], result["trainable_parameters"], result["train_loss"]) == (0, 0, None)
    assert try_command(f"run={record.folder}") is None, "the head is drawn again as it was"


UNTRAINED = ["model=tiny-roberta", "task=demo/sentiment", "method=none", "wandb.mode=disabled"]


@pytest.mark.parametrize(
    "words",
    [
        ["train.lr=0.5"],
        ["train.gradient_checkpointing=true"],
        ["train.early_stopping=2", "eval.development_rows=8"],
        ["model.dropout=0.3"],
        ["task.checkpoint=best"],
        ["task.label_smoothing=0.1"],
    ],
    ids=str,
)
def test_settings_of_training_are_refused_where_nothing_trains(words, runs_folder):
    key = words[0].partition("=")[0]
    with pytest.raises(UserError, match=f"^{key}=.*: nothing trains with method=none; drop it$"):
        check_command([*UNTRAINED, *words])
    check_command([*UNTRAINED, *words, "plan=true"])


def test_settings_of_training_may_be_shared_with_runs_that_train(runs_folder):
    assert len(check_command(["-m", *UNTRAINED[:2], "method=none,lora", "train.lr=0.5"])) == 2
    check_command([*UNTRAINED, "train.max_examples=8", "eval.holdout=9", "task.validation_rows=9"])
    labels = {cell.label for cell in Experiment.load("baselines", "smoke").compose_cells(["train.accumulation=2"])}
    assert "Untrained" in labels


def test_the_head_alone_trains(runs_folder):
    record, result = train("tiny-roberta", "method=head_only")
    assert result["steps"] == 2 and result["adapter_parameters"] == 0 < result["trainable_parameters"]
    assert all("classifier" in name for name in load_file(record.folder / "adapter/adapter_model.safetensors"))
    assert try_command(f"run={record.folder}") is None
    with pytest.raises(UserError, match="nothing would train, because demo/restaurants has no head of its own"):
        train("tiny-llama", "method=head_only")


@pytest.mark.parametrize("setting", ["rank=8", "alpha=2.0", "dropout=0.1"])
def test_a_setting_that_a_method_does_not_take_is_refused(setting):
    with pytest.raises(UserError, match=f"^method.{setting}: method none has no "):
        load_settings(["method=none", f"method.{setting}"])
    assert load_settings(["method=lora", f"method.{setting}"]).method.peft["r"] in (8, 16)


def test_loha_trains_as_many_weights_as_lora_of_its_rank():
    settings = load_settings(["method=loha", "method.rank=6"])
    assert settings.method.peft["r"] == 3
    with pytest.raises(UserError, match="^method.peft.r: .*5 must be even"):
        load_settings(["method=loha", "method.rank=5"])


def test_a_trial_does_not_change_what_is_drawn_next():
    settings = load_settings(["model=tiny-roberta", "task=demo/sentiment", "method=lora", "method.dropout=0.5"])
    drawn = []
    for probe in (True, False):
        base, _ = load_model(settings, load_task(settings))
        with pytest.MonkeyPatch.context() as patch:
            if not probe:
                patch.setattr("dual_lora.lab.model.adapt.check_forward", lambda *_: None)
            torch.manual_seed(0)
            attach_method(base, settings, "classification")
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("named", ["[word_embeddings]", "[word_embeddings,pooler]", "[]"])
def test_a_head_trains_whatever_modules_train_beside_it(named):
    words = ["model=tiny-deberta", "task=demo/sentiment", "method=lora", f"+method.peft.modules_to_save={named}"]
    settings = load_settings(words)
    model, _ = draw_initial_model(settings, load_task(settings))
    trained = [name.split(".") for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name]
    modules = {parts[parts.index("modules_to_save") - 1] for parts in trained}
    assert modules == {"pooler", "classifier"} | ({"word_embeddings"} if "word" in named else set())


@pytest.mark.parametrize("field", FILLED_FIELDS)
def test_null_of_a_field_that_the_harness_fills_in_is_not_given(field):
    words = ["model=tiny-roberta", "task=demo/sentiment", "model.head=[pooler]", "method=lora"]
    given, plain = (
        build_adapter_config(load_settings(some), "classification")
        for some in ([*words, f"+method.peft.{field}=null"], words)
    )
    assert given.to_dict() == plain.to_dict() and given.target_modules and given.modules_to_save == ["pooler"]
