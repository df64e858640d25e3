"""Every setting holds a value of its type, wherever it comes from: another setting, a list, or a mapping."""

import json
from dataclasses import asdict, replace

import pytest
import yaml

from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.commands.train import train_command
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.overrides import parse_overrides
from dual_lora.lab.config.paths import ROOT, format_yaml
from dual_lora.lab.config.recorded import format_settings, load_recorded_settings
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.adapt import build_adapter_config
from dual_lora.lab.record.identity import compute_identity
from dual_lora.lab.record.run import Run
from dual_lora.lab.report.command_lines import build_words
from dual_lora.lab.study.launch.command import prepare_launch_folder

WRONG = {
    "seed=${train.lr}": "seed: .*'0.002' .*could not be converted to Integer",
    "model.adapt=${seed}": "model.adapt=0: must be a list of texts",
    "model.adapt=[[q]]": r"model.adapt=\[\['q'\]\]: must be a list of texts",
    "task.stop=[{a:1}]": "task.stop=.*: must be a list of texts",
    "wandb.tags=[[a]]": "wandb.tags=.*: must be a list of texts",
    "train=${eval}": "train.*: missing",
    "train.lr=???": r"train.lr: \?\?\? is a placeholder",
    "train=???": r"train: \?\?\? is a placeholder",
    "method.peft={peft_type: [LORA]}": "names no peft_type",
}


@pytest.mark.parametrize("word", WRONG)
def test_a_value_of_another_type_is_refused(word):
    with pytest.raises(UserError, match=WRONG[word]):
        load_settings([word])


def test_a_value_of_the_right_type_may_come_from_another_setting():
    settings = load_settings(["seed=${method.rank}", "study=s${seed}", "train.adam_epsilon=${train.lr}"])
    assert (settings.seed, settings.study, settings.train.adam_epsilon) == (16, "s16", settings.train.lr)
    assert load_settings(["study=${seed}"]).study == load_settings(["study=0"]).study == "0"


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("task_type=FEATURE_EXTRACTION", "the task decides it, here SEQ_CLS"),
        ("task_type=null", "task_type=null: the task decides it, here SEQ_CLS"),
        ("inference_mode=true", "nothing .* train"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "dual_lora"])
def test_a_field_by_which_less_would_train_is_refused(method, field, message):
    words = ["model=tiny-roberta", "task=demo/sentiment", f"method={method}", f"+method.peft.{field}"]
    with pytest.raises(UserError, match=message):
        build_adapter_config(load_settings(words), "classification")


LIKE_NUMBERS = ["1e3", "1E3", "+1e3", "-1e-3", "1.e3", "1_0e3", "7e5", "123e4567"]  # to OmegaConf's loader alone
LIKE_OTHERS = [
    "1_000",
    "0x10",
    "017",
    ".5e3",
    "12:30:00",
    "on",
    "null",
    "~",
    "",
    "2024-01-01",
    "<<",
    "=",
    ".nan",
    "a: b",
]
WRITER = ["model=tiny-llama", "task=demo/restaurants"]


@pytest.fixture
def texts():
    """Settings that hold such texts in every place that takes any: lists, mappings, and fields of their own."""
    settings = load_settings(WRITER)
    stop, peft = LIKE_NUMBERS + LIKE_OTHERS, settings.method.peft | {"alpha_pattern": dict.fromkeys(LIKE_NUMBERS, 4)}
    model, task = replace(settings.model, revision="123e4567"), replace(settings.task, stop=stop)
    return replace(settings, study="1e3", model=model, task=task, method=replace(settings.method, peft=peft))


def test_a_text_that_looks_like_a_number_is_a_text_wherever_settings_are_written(texts, runs_folder, capsys):
    run = Run.prepare(texts)
    run.record.prepare_folder(texts)
    folder = prepare_launch_folder([run])
    for place in (run.record.folder, folder / "0"):
        assert load_recorded_settings(place) == texts and run.identity == compute_identity(
            load_recorded_settings(place)
        )
    assert train_command([*WRITER, "task.stop=['1e3']", "--cfg", "job"]) == 0
    assert "  stop:\n  - '1e3'\n" in capsys.readouterr().out


def test_other_settings_are_written_as_before(texts):
    for text in LIKE_OTHERS:
        assert format_yaml({text: [text]}) == yaml.safe_dump({text: [text]})
    for file in sorted((ROOT / "runs").glob("*/*/config.yaml"))[::10]:
        settings = load_recorded_settings(file.parent)
        assert format_settings(settings) == yaml.safe_dump(asdict(settings), sort_keys=False), file


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "${seed}": r"^task.stop.0=\$\{seed\}: a record would give it back as 0; give another value$",
        "${b}": r"^a record cannot hold these settings \(task.stop\[0\]: .* 'b' not found\); change them$",
    }.items(),
)
def test_a_text_that_a_record_would_give_back_otherwise_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        format_settings(load_settings([*WRITER, f"task.stop=['\\{text}']"]))


def test_a_run_whose_labels_look_like_numbers_is_evaluated_from_its_record(tmp_path, runs_folder):
    for split in ("train", "test"):
        rows = [f"{split} {n},{('1e3', '2e3')[n % 2]}" for n in range(12)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,label", *rows, ""]))
    words = ["model=tiny-roberta", "task=classification", f"data_dir={tmp_path}", "task.options.labels=['1e3','2e3']"]
    assert train_command([*words, "train.max_steps=1", "eval.before=false", "wandb.mode=disabled"]) == 0
    (run,) = (path.parent for path in runs_folder.glob("*/*/result.json"))
    assert evaluate_command([f"run={run}"]) == 0
    assert json.loads((run / "evaluation.json").read_text())["equal"]


@pytest.mark.parametrize("text", ["1e3", "null", "true", "7", "a-b"])
def test_a_reports_command_keeps_a_text_that_looks_like_another_value(text):
    settings = load_settings([*WRITER, f"task.stop=['{text}']"])
    assert load_settings(build_words(settings)).task.stop == [text]


@pytest.mark.parametrize("word", ["2024_01", "1.10", "1e3", "007", "-0", "true"])
def test_a_text_that_looks_like_a_number_stays_as_it_is_written(word):
    """Hydra reads these as numbers, or true, whose text is another: 202401, 1.1, 1000.0, True."""
    assert load_settings([f"study={word}"]).study == word
    assert load_settings([f"model.path={word}"]).model.path == word
    assert [load_settings(run).study for run in parse_overrides([f"study=a, {word},7"])] == ["a", word, "7"]
