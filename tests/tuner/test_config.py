"""DualLoraConfig: the meaning of the budget, contradictions, and that every field is saved."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from peft import PeftConfig, get_peft_model
from torch import nn

from dual_lora import DualLoraConfig
from tests.tuner.layers import Net

INF, NAN = float("inf"), float("nan")


def test_defaults_are_the_paper_s_map():
    c = DualLoraConfig()
    assert (c.r, c.magnitude_ratio, c.r1, c.r2, c.split(c.r)) == (16, 0.5, None, None, (8, 8))
    assert (c.lora_alpha, c.ste, c.magnitude, c.direction, c.kernel) == (16, "clip", "relu", "sign", "auto")


@pytest.mark.parametrize(
    "given, r, split",
    [
        ({"r": 8}, 8, (4, 4)),
        ({"r": 16, "magnitude_ratio": 0.25}, 16, (4, 12)),
        ({"r": 2, "magnitude_ratio": 0.01}, 2, (1, 1)),
        ({"r": 3, "magnitude_ratio": 0.99}, 3, (2, 1)),
        ({"r1": 3, "r2": 9}, 12, (3, 9)),
        ({"r": 12, "r1": 3, "r2": 9}, 12, (3, 9)),
        ({"r": 12, "r1": 3}, 12, (3, 9)),
        ({"r2": 9}, 16, (7, 9)),
    ],
)
def test_budget_and_split(given, r, split):
    c = DualLoraConfig(**given)
    assert c.r == r and c.split(c.r) == split


def test_rank_pattern_is_split_by_the_ratio_of_r1_and_r2():
    c = DualLoraConfig(r1=4, r2=12, rank_pattern={"q": 8})
    assert c.split(8) == (2, 6)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"r": 1}, "r=1"),
        ({"r": 8.0}, "r=8.0"),
        ({"magnitude_ratio": 0.0}, "magnitude_ratio"),
        ({"magnitude_ratio": 1.0}, "magnitude_ratio"),
        ({"r": 16, "r1": 4, "r2": 4}, "r1 \\+ r2 = r"),
        ({"r": 8, "r1": 8}, "r1=8"),
        ({"r1": 0, "r2": 8}, "r1=0"),
        ({"r1": 4, "r2": 12, "magnitude_ratio": 0.5}, "contradicts"),
        ({"scale_warmup_steps": -1}, "scale_warmup_steps"),
        ({"scale_warmup_steps": 1.5}, "scale_warmup_steps"),
        ({"scale_warmup_steps": True}, "scale_warmup_steps"),
        *(({name: value}, name) for name in ("init_std", "direction_init_std") for value in (0.0, -1.0, INF, NAN, "1")),
        *(({"lora_alpha": value}, "lora_alpha") for value in (0, -1, INF, NAN, 1e39, 1e-50, "16", True)),
        *(({"lora_dropout": value}, "lora_dropout") for value in (1.0, -0.1, NAN, "0.1")),
        ({"magnitude_ratio": NAN}, "magnitude_ratio"),
        ({"alpha_pattern": {"q": INF}}, "alpha_pattern"),
        ({"ste": "bnn"}, "clip, identity, hardtanh"),
        ({"magnitude": "gelu"}, "relu, abs, softplus, leaky_relu, squared_relu, identity"),
        ({"direction": "cos"}, "sign, tanh, sigmoid, identity"),
        ({"kernel": "fpga"}, "kernel='fpga'"),
        ({"rank_pattern": {"q": 1}}, "rank_pattern"),
        ({"alpha_pattern": {"q": -1}}, "alpha_pattern"),
        ({"fused_slices": {"c_attn": [3, [0, 3]]}}, "fused_slices"),
        ({"fused_slices": {"c_attn": [3, [0, 0]]}}, "fused_slices"),
        ({"fused_slices": {"c_attn": [3, []]}}, "fused_slices"),
        ({"fused_slices": {"c_attn": 3}}, "fused_slices"),
        ({"fused_slices": {"c_attn": [2, [0.0]]}}, "fused_slices"),
        ({"fused_slices": {"c_attn": [2, [True]]}}, "fused_slices"),
        ({"fused_slices": {"c_attn": [2.0, [1]]}}, "fused_slices"),
        ({"layers_pattern": "h"}, "layers_to_transform"),
        ({"target_modules": ".*q", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"task_type": "SORTING"}, "task type"),
        ({"r1": "4", "r2": 4}, "^r1='4': expected None or an integer"),
        ({"r": True}, "^r=True: expected None or an integer"),
        ({"magnitude_ratio": "0.5"}, "^magnitude_ratio='0.5': expected None or a number"),
        ({"rank_pattern": [1]}, r"^rank_pattern=\[1\]: expected a dictionary"),
        ({"alpha_pattern": {"q": "1"}}, r"^alpha_pattern\['q'\]='1'"),
        *(({"init_weights": value}, "^init_weights=.*: expected True or False") for value in ("pissa", None, 1)),
        ({"keep_update": "no"}, "^keep_update='no': expected True or False"),
        ({"trainable_token_indices": 3}, "^trainable_token_indices=3: expected None, a list of ids"),
        ({"bias": "lora_only"}, "^bias='lora_only': expected one of none, all, dual_lora_only"),
        ({"magnitude": ["relu"]}, r"^magnitude=\['relu'\]: expected one of relu"),
    ],
)
def test_impossible_values_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        DualLoraConfig(**fields)


EVERY_FIELD = {
    "r": 12,
    "magnitude_ratio": 0.25,
    "r1": 3,
    "r2": 9,
    "lora_alpha": 7.5,
    "lora_dropout": 0.1,
    "init_weights": False,
    "init_std": 0.03,
    "direction_init_std": 0.05,
    "scale_warmup_steps": 17,
    "scale_warmup_shape": "cosine",
    "ste": "hardtanh",
    "magnitude": "abs",
    "direction": "tanh",
    "direction_dtype": "bfloat16",
    "freeze": "direction",
    "kernel": "eager",
    "target_modules": {"q_proj", "v_proj"},
    "exclude_modules": {"lm_head"},
    "fused_slices": {"c_attn": [3, [0, 2]]},
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"v_proj": 2.0},
    "layers_to_transform": [0, 2],
    "layers_pattern": ["h"],
    "bias": "dual_lora_only",
    "modules_to_save": ["score"],
    "trainable_token_indices": {"embed_tokens": [3, 5]},
}


# Fields that do not go with those above.
OTHER_FIELDS = {"weight_gradient_dtype": "bfloat16", "input_gradient_dtype": "bfloat16", "keep_update": True}


@pytest.mark.parametrize("values", [EVERY_FIELD, OTHER_FIELDS], ids=["most", "others"])
def test_every_field_survives_saving(tmp_path, values):
    own = {f.name for f in dataclasses.fields(DualLoraConfig)} - {f.name for f in dataclasses.fields(PeftConfig)}
    assert own == EVERY_FIELD.keys() | OTHER_FIELDS.keys()
    config = DualLoraConfig(**values)
    default = DualLoraConfig()
    assert all(getattr(config, name) == value != getattr(default, name) for name, value in values.items())
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is DualLoraConfig and loaded.to_dict() == config.to_dict()


def test_a_saved_default_loads_as_the_same(tmp_path):
    DualLoraConfig(magnitude_ratio=0.3).save_pretrained(tmp_path)
    assert DualLoraConfig.from_pretrained(tmp_path).to_dict() == DualLoraConfig(magnitude_ratio=0.3).to_dict()


def test_a_config_from_before_a_field_means_what_it_meant(tmp_path):
    DualLoraConfig(init_std=0.3, scale_warmup_steps=100).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    del fields["direction_init_std"]
    file.write_text(json.dumps(fields))
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert (loaded.direction_init_std, loaded.init_std, loaded.scale_warmup_steps) == (None, 0.3, 100)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("r1", 2, "magnitude_ratio=0.5 of r=8 contradicts r1=2"),
        ("r", 1, "r=1"),
        ("freeze", "directions", "freeze='directions'"),
        ("kernel", "tritn", "kernel='tritn'"),
        ("scale_warmup_shape", "lin", "scale_warmup_shape='lin'"),
        ("weight_gradient_dtype", "float16", "weight_gradient_dtype='float16'"),
        ("alpha_pattern", {"layer": -1}, "alpha_pattern"),
    ],
)
def test_a_field_that_is_set_later_is_checked_before_it_counts(tmp_path, name, value, message):
    config = DualLoraConfig(r=8, target_modules=["layer"])
    model = get_peft_model(Net(nn.Linear(4, 4)), copy.deepcopy(config))
    for some, act in (
        (config, lambda: get_peft_model(Net(nn.Linear(4, 4)), config)),
        (config, lambda: model.add_adapter("second", config)),
        (model.peft_config["default"], lambda: model.peft_config["default"].save_pretrained(tmp_path)),
    ):
        setattr(some, name, value)
        with pytest.raises(ValueError, match=message):
            act()


def test_a_field_that_is_set_later_counts():
    config = DualLoraConfig(r=8, target_modules=["layer"])
    config.r, config.freeze, config.lora_alpha = 4, "direction", np.float32(3)
    factors = get_peft_model(Net(nn.Linear(4, 4)), config).base_model.model.layer.dual_lora_factors["default"]
    assert factors.A.shape[0] == factors.C.shape[0] == 2 and factors.scaling == 1.5
    assert factors.A.requires_grad and not factors.C.requires_grad


def test_numbers_of_numpy_are_saved(tmp_path):
    values = {"r": 12, "lora_alpha": 7.5, "lora_dropout": 0.25, "init_std": 0.5, "magnitude_ratio": 0.25}
    patterns = {"rank_pattern": {"q": 4}, "alpha_pattern": {"q": 2.0}, "fused_slices": {"c": [3, [0, 2]]}}
    in_numpy = {name: np.int64(v) if isinstance(v, int) else np.float32(v) for name, v in values.items()} | {
        "rank_pattern": {"q": np.int32(4)},
        "alpha_pattern": {"q": np.float16(2)},
        "fused_slices": {"c": [np.int64(3), list(np.arange(0, 3, 2))]},
    }
    DualLoraConfig(**in_numpy).save_pretrained(tmp_path)
    assert DualLoraConfig.from_pretrained(tmp_path) == DualLoraConfig(**values, **patterns)
