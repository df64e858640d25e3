"""The option `freeze`: one of the two groups stays as it was drawn, through PEFT's switches and with every kernel."""

import copy

import pytest
import torch
from peft import PeftModel

from dual_lora import DualLoraConfig
from dual_lora.tuner.warmup import list_factors
from tests.tuner.tiny_llama import adapted, batches, llama, trained

GROUPS = {"magnitude": ("A", "B"), "direction": ("C", "D")}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def train(model, steps=3):
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.1)
    for ids in batches(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kernel", ["eager", "recompute"])
@pytest.mark.parametrize("group", GROUPS)
def test_a_frozen_group_does_not_move_and_the_other_trains(group, kernel):
    model = adapted(freeze=group, kernel=kernel, scale_warmup_steps=1)
    before = copy.deepcopy(list_factors(model))
    train(model)
    for factors, old in zip(list_factors(model), before, strict=True):
        moved = {name for name in "ABCD" if not torch.equal(getattr(factors, name), getattr(old, name))}
        assert moved == set("ABCD") - set(GROUPS[group])
        assert int(factors.step) == 1 and factors.weight.requires_grad


def test_by_default_all_four_train():
    assert all(p.requires_grad for factors in list_factors(adapted()) for p in factors.parameters())


def test_the_gradients_of_the_other_group_are_those_without_freezing():
    ids = batches(1)[0]
    grads = {}
    for freeze in (None, *GROUPS):
        torch.manual_seed(0)
        model = adapted(freeze=freeze, scale_warmup_steps=0)
        model(input_ids=ids, labels=ids).loss.backward()
        grads[freeze] = [{n: getattr(f, n).grad for n in "ABCD"} for f in list_factors(model)]
    for group, names in GROUPS.items():
        for frozen, whole in zip(grads[group], grads[None], strict=True):
            for name in "ABCD":
                kept = frozen[name] is None if name in names else torch.equal(frozen[name], whole[name])
                assert kept and whole[name].any()


def test_only_the_trained_group_counts_as_trainable():
    half, whole = adapted(freeze="direction", magnitude_ratio=0.25), adapted(magnitude_ratio=0.25)
    assert half.get_nb_trainable_parameters()[0] * 4 == whole.get_nb_trainable_parameters()[0]


def test_peft_s_switches_leave_a_group_frozen():
    model = adapted(freeze="direction")

    def training():
        return [{n for n in "ABCD" if getattr(f, n).requires_grad} for f in list_factors(model)]

    count = len(list_factors(model))
    model.add_adapter("other", DualLoraConfig(r=8, target_modules="all-linear"))
    model.set_adapter("other")
    assert training() == [set(), set("ABCD")] * count
    model.set_adapter("default")
    assert training() == [set("AB"), set()] * count
    model.set_requires_grad("default", False)
    assert training() == [set(), set()] * count
    model.set_requires_grad("default", True)
    assert training() == [set("AB"), set()] * count


def test_a_saved_adapter_holds_the_frozen_group_and_its_freezing(tmp_path):
    torch.manual_seed(3)
    base = llama()
    model = adapted(copy.deepcopy(base), freeze="magnitude", scale_warmup_steps=1)
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    for mine, other in zip(list_factors(model), list_factors(loaded), strict=True):
        assert all(torch.equal(getattr(mine, n), getattr(other, n)) for n in "ABCD")
        assert {n for n in "ABCD" if getattr(other, n).requires_grad} == {"C", "D"}


@pytest.mark.parametrize("value", ["A", "sign", True])
def test_another_group_is_refused(value):
    with pytest.raises(ValueError, match="freeze=.*expected one of None, magnitude, direction"):
        DualLoraConfig(freeze=value)
