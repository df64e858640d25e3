"""Settings that name modules: a name or a pattern that matches nothing would have no effect, so it is refused."""

import warnings

import pytest
import torch
from peft import get_peft_model

from dual_lora import DualLoraConfig
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.adapt import attach_method, check_named_modules
from dual_lora.lab.train.meta_step import build_meta_model

ENCODER = ["model=tiny-roberta", "task=demo/sentiment"]
LORA_ON_QUERIES = ["method=lora", "+method.peft.target_modules=[query]"]


def check(*words: str) -> None:
    """Do what a run and a plan do, on the meta device.

    Raises:
        UserError: a name matches nothing.
    """
    settings = load_settings([*ENCODER, *words])
    task = load_task(settings)
    model = attach_method(build_meta_model(settings, task), settings, task.form)
    check_named_modules(model, settings, task.form)
    assert settings == load_settings([*ENCODER, *words])  # PEFT has not changed them


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (["model.head=[nonsense]"], "model.head: tiny-roberta has no module 'nonsense'"),
        (
            ["method=lora", "model.roles.q=foo"],
            "^model.roles.q: 'foo' matches no module; .* such as dense, key, .*query, .*value",
        ),
        (["method=dual_lora", "model.roles.k=keyy", "model.adapt=[q,k]"], "model.roles.k: 'keyy' .*Did you mean key?"),
        (["method=loha", "+model.roles.x=pooler", "model.adapt=[q,x]"], "model.roles.x: 'pooler' matches no module"),
        (["method=full", "model.head=[clasifier]"], "model.head: .*'clasifier'; .*Did you mean classifier?"),
        (["method=dual_lora", "+method.peft.rank_pattern={quary:4}"], "rank_pattern: 'quary' .*Did you mean query?"),
        (["method=dual_lora", "+method.peft.alpha_pattern={xyz:4}"], "alpha_pattern: 'xyz' .*, query, value\\.$"),
        (["method=lora", "+method.peft.rank_pattern={query:4,keys:8}"], "method.peft.rank_pattern: 'keys' matches no"),
        (["method=loha", "+method.peft.rank_pattern={nonsense:4}"], "method.peft.rank_pattern: 'nonsense'"),
        ([*LORA_ON_QUERIES, "+method.peft.layers_to_transform=[0,9]"], "method.peft.layers_to_transform: '9"),
        (["method=lora", "+method.peft.exclude_modules=[nonsense]"], "method.peft.exclude_modules: 'nonsense'"),
        (["method=lora", "+method.peft.target_modules=[query,nonsense]"], "method.peft.target_modules: 'nonsense'"),
        (["method=lora", "+method.peft.modules_to_save=[classifier,scores]"], "method.peft.modules_to_save: 'scores'"),
    ],
)
def test_a_name_that_matches_nothing_is_refused(words, culprit):
    with pytest.raises(UserError, match=culprit) as caught:
        check(*words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        ["model.head=[classifier]"],
        ["method=lora", "model.adapt=[v]"],
        ["method=lora", "model.roles.q=query|foo"],
        ["method=lora", "+method.peft.target_modules=[value]"],
        ["method=lora", "+method.peft.exclude_modules=[query]"],
        ["method=full"],
        ["method=dual_lora", "+method.peft.rank_pattern={layer.0.attention.self.query:4}"],
        [*LORA_ON_QUERIES, "+method.peft.rank_pattern={query:4}", "+method.peft.layers_to_transform=[0,1]"],
        ["method=lora", "+method.peft.exclude_modules=[key]", "+method.peft.target_modules=[query,value]"],
        ["method=lora", "+method.peft.modules_to_save=[classifier]"],
    ],
)
def test_names_that_match_are_taken(words):
    check(*words)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_the_method_alone_warns_of_a_pattern_that_matches_nothing(field):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    with pytest.warns(UserWarning, match=f"{field}: no adapted module is called 'second'"):
        get_peft_model(model, DualLoraConfig(r=4, target_modules=["0"], **{field: {"second": 6, "0": 6}}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = DualLoraConfig(r=4, target_modules=["0"], **{field: {"0": 6}})
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config)
