"""Every setting holds a value of its type, wherever it comes from: another setting, a list, or a mapping."""

import pytest

from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.adapt import build_adapter_config

WRONG = {
    "seed=${train.lr}": "seed: .*'0.002' .*could not be converted to Integer",
    "model.adapt=${seed}": "model.adapt=0: must be a list of texts",
    "model.adapt=[[q]]": r"model.adapt=\[\['q'\]\]: must be a list of texts",
    "task.stop=[{a:1}]": "task.stop=.*: must be a list of texts",
    "wandb.tags=[[a]]": "wandb.tags=.*: must be a list of texts",
    "train=${eval}": "train.*: missing",
    "train.lr=???": r"train.lr: \?\?\? is no value",
    "train=???": r"train: \?\?\? is no value",
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
