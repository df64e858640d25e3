"""The ramp of f: exactly one step per optimizer step, its state, and setting f by hand."""

import copy
import pickle
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from dual_lora import DualLoraConfig, DualLoraWarmupCallback, set_update_scale
from tests.tuner.layers import IN, OUT, Net, config, factors_of, layer_of, list_files

STEPS = 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def ramping(**fields):
    return get_peft_model(Net(nn.Linear(IN, OUT)), config(**{"scale_warmup_steps": STEPS, **fields}))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def train_step(model, optimizer, micro_batches=1):
    for _ in range(micro_batches):
        model(torch.randn(3, IN)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def f_of(model, adapter="default"):
    return factors_of(model, adapter).update_scale.item()


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_f_is_the_share_of_optimizer_steps_done(make, micro_batches):
    model = ramping()
    optimizer = make(trained(model), lr=1e-3)
    seen = [f_of(model)]
    for _ in range(STEPS + 2):
        train_step(model, optimizer, micro_batches)
        seen.append(f_of(model))
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors_of(model).step == STEPS


def test_the_model_starts_as_its_base_and_the_first_step_moves_nothing():
    model = ramping()
    x = torch.randn(3, IN)
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(model(x), base)
    before = copy.deepcopy(factors_of(model).state_dict())
    train_step(model, torch.optim.SGD(trained(model), lr=1.0))
    assert all(torch.equal(before[n], factors_of(model).state_dict()[n]) for n in "ABCD")


@pytest.mark.parametrize("fields", [{"scale_warmup_steps": 0}, {"init_weights": False}], ids=str)
def test_no_ramp_starts_at_full_scale(fields):
    model = ramping(**fields)
    assert f_of(model) == 1.0
    train_step(model, torch.optim.SGD(trained(model), lr=1e-3))
    assert f_of(model) == 1.0


def test_an_optimizer_that_trains_something_else_does_not_advance():
    model, other = ramping(), nn.Linear(IN, OUT)
    train_step(other, torch.optim.SGD(other.parameters(), lr=1e-3))
    assert f_of(model) == 0.0


def test_two_optimizers_on_one_adapter_advance_it_once_per_round():
    model = ramping()
    factors = factors_of(model)
    magnitude = torch.optim.SGD([factors.A, factors.B], lr=1e-3)
    direction = torch.optim.Adam([factors.C, factors.D], lr=1e-3)
    model(torch.randn(3, IN)).sum().backward()
    magnitude.step()
    direction.step()
    assert f_of(model) == 0.25


@pytest.mark.parametrize("held", ["CD", "B", "ABCD"])
def test_an_optimizer_of_some_factors_advances(held):
    model = ramping()
    optimizer = torch.optim.SGD([getattr(factors_of(model), name) for name in held], lr=1e-3)
    seen = []
    for _ in range(STEPS + 1):
        train_step(model, optimizer)
        seen.append(f_of(model))
    assert seen == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("order", [("AB", "CD"), ("CD", "AB"), ("D", "C", "B", "A"), ("D", "B"), ("CD", "A")], ids=str)
def test_optimizers_in_any_order_advance_once_per_round(order):
    model = ramping()
    optimizers = [torch.optim.SGD([getattr(factors_of(model), n) for n in names], lr=1e-3) for names in order]
    seen = []
    for _ in range(STEPS):
        model(torch.randn(3, IN)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        seen.append(f_of(model))
    assert seen == [0.25, 0.5, 0.75, 1.0]


def test_a_new_optimizer_goes_on_at_once():
    model = ramping()
    for _ in range(3):
        kept = torch.optim.SGD(trained(model), lr=1e-3)
        train_step(model, kept)
    assert f_of(model) == 0.75


def test_where_one_of_two_optimizers_stops_the_other_goes_on():
    model = ramping(scale_warmup_steps=8)
    magnitude, direction = (
        torch.optim.SGD([getattr(factors_of(model), name) for name in names], lr=1e-3) for names in ("AB", "CD")
    )
    for optimizer in (magnitude, direction, direction, direction, magnitude, direction, magnitude, magnitude):
        train_step(model, optimizer)
    # Counted: the first step, the direction's alone, and the magnitude's from its second after those.
    assert factors_of(model).step == 5


class Wrapping(torch.optim.Optimizer):
    """Steps another optimizer within its own step, as ZeroRedundancyOptimizer does."""

    def __init__(self, inner, params):
        super().__init__(params, {})
        self.inner = inner
        self.broken = False

    def step(self, closure=None):
        if self.broken:
            raise RuntimeError("no step")
        self.inner.step()
        if self.broken is None:
            raise RuntimeError("no end")


class Derived(torch.optim.SGD):
    """Its step calls that of a class of which there are optimizers of their own, so the hooks fire for both."""

    def step(self, closure=None):
        return super().step(closure)


def wrap(parameters):
    return Wrapping(torch.optim.SGD(parameters, lr=1e-3), parameters)


def wrap_part(parameters):
    return Wrapping(torch.optim.SGD(parameters[2:], lr=1e-3), parameters)


def derive(parameters):
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    return Derived(parameters, lr=1e-3)


@pytest.mark.parametrize("make", [wrap, wrap_part, lambda p: wrap(p[2:]), derive, lambda p: derive(p[2:])])
def test_a_step_within_a_step_counts_once(make):
    model = ramping()
    optimizer = make(trained(model))
    seen = []
    for _ in range(STEPS):
        train_step(model, optimizer)
        seen.append(f_of(model))
    assert seen == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("broken, counted", [(True, 0.0), (None, 0.25)])
def test_steps_that_raise_leave_the_count_right(broken, counted):
    model = ramping()
    optimizer = wrap(trained(model))
    optimizer.broken = broken
    model(torch.randn(3, IN)).sum().backward()
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert f_of(model) == counted
    train_step(model, torch.optim.SGD(trained(model), lr=1e-3))
    optimizer.broken = False
    train_step(model, optimizer)
    assert f_of(model) == counted + 0.5


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_torch_s_sharded_optimizer_counts_each_step_once():
    model = ramping()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        optimizer = ZeroRedundancyOptimizer(trained(model), torch.optim.AdamW, lr=1e-3)
        for _ in range(3):
            train_step(model, optimizer)
    finally:
        dist.destroy_process_group()
    assert factors_of(model).step == 3


def test_training_only_the_direction_group_advances():
    model = ramping()
    factors = factors_of(model)
    factors.A.requires_grad_(False)
    factors.B.requires_grad_(False)
    train_step(model, torch.optim.SGD(trained(model), lr=1e-3))
    assert f_of(model) == 0.25


def test_only_the_active_adapter_ramps():
    model = ramping()
    model.add_adapter("other", config(scale_warmup_steps=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)  # holds both adapters and the frozen base
    train_step(model, optimizer)
    assert (f_of(model), f_of(model, "other")) == (0.25, 0.0)
    model.set_adapter("other")
    train_step(model, optimizer)
    assert (f_of(model), f_of(model, "other")) == (0.25, 0.5)


def test_an_adapter_added_to_a_running_optimizer_ramps():
    model = ramping()
    optimizer = torch.optim.SGD(trained(model), lr=1e-3)
    train_step(model, optimizer)
    model.add_adapter("other", config(scale_warmup_steps=2))
    model.set_adapter("other")
    optimizer.add_param_group({"params": trained(model)})
    train_step(model, optimizer)
    assert (f_of(model), f_of(model, "other")) == (0.25, 0.5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_ramps_on_its_own(copied):
    model = ramping()
    twin = copied(model)
    train_step(twin, torch.optim.SGD(trained(twin), lr=1e-3))
    assert (f_of(model), f_of(twin)) == (0.0, 0.25)


def test_a_reloaded_adapter_computes_what_was_trained_and_goes_on(tmp_path):
    model = ramping()
    base = Net(copy.deepcopy(layer_of(model).get_base_layer()))
    optimizer = torch.optim.SGD(trained(model), lr=1e-3)
    for _ in range(3):
        train_step(model, optimizer)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    x = torch.randn(3, IN)
    assert torch.equal(again.eval()(x), model.eval()(x)) and f_of(again) == 0.75
    train_step(again, torch.optim.SGD(trained(again), lr=1e-3))
    assert f_of(again) == 1.0


@pytest.mark.parametrize(
    ("saved", "done", "loaded", "seen", "told"),
    [
        ({"scale_warmup_steps": 2}, 4, {"scale_warmup_steps": 20}, [1.0, 1.0], False),
        ({"scale_warmup_steps": 4}, 2, {"scale_warmup_steps": 10}, [0.5, 0.6], True),
        ({"scale_warmup_steps": 20}, 10, {"scale_warmup_steps": 4}, [0.5, 0.75, 1.0, 1.0], True),
        ({"scale_warmup_steps": 20}, 10, {"scale_warmup_steps": 0}, [0.5, 0.5], True),
        ({"scale_warmup_steps": 4}, 3, {"scale_warmup_steps": 4}, [0.75, 1.0], False),
        ({}, 2, {"scale_warmup_shape": "quadratic"}, [0.5, 1.0], True),
        ({"scale_warmup_steps": 20}, 0, {"scale_warmup_steps": 2}, [0.0, 0.5, 1.0], False),
    ],
    ids=["ended", "longer", "shorter", "none", "same", "shape", "begin"],
)
def test_a_ramp_of_another_length_goes_on_from_its_f(saved, done, loaded, seen, told):
    model, again = ramping(**saved), ramping(**loaded)
    optimizer = torch.optim.SGD(trained(model), lr=1e-3)
    for _ in range(done):
        train_step(model, optimizer)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        again.load_state_dict(model.state_dict())
    assert [warning.filename for warning in found if "goes on at step" in str(warning.message)] == [__file__] * told
    optimizer, heights = torch.optim.SGD(trained(again), lr=1e-3), [f_of(again)]
    for _ in seen[1:]:
        train_step(again, optimizer)
        heights.append(f_of(again))
    assert heights == pytest.approx(seen)


@pytest.mark.parametrize(("f", "steps"), [(0.3, STEPS), (0.0, 2 * STEPS), (1.5, 2 * STEPS), (-1.0, STEPS // 2)])
def test_f_set_by_hand_stays_when_loaded(f, steps):
    model, again = ramping(), ramping(scale_warmup_steps=steps)
    set_update_scale(model, f)
    again.load_state_dict(model.state_dict())
    train_step(again, torch.optim.SGD(trained(again), lr=1e-3))
    assert f_of(again) == pytest.approx(f)


def test_f_set_by_hand_stays():
    model = ramping()
    set_update_scale(model, 0.3)
    train_step(model, torch.optim.SGD(trained(model), lr=1e-3))
    assert f_of(model) == pytest.approx(0.3)


def test_the_ramp_can_go_on_from_f_set_by_hand():
    model = ramping()
    optimizer = torch.optim.SGD(trained(model), lr=1e-3)
    set_update_scale(model, 0.3)
    set_update_scale(model, 0.5, ramp=True)
    assert f_of(model) == 0.5
    train_step(model, optimizer)
    assert f_of(model) == 0.75


@pytest.fixture
def bfloat16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_ramp_keeps_its_step_under_any_default_dtype(bfloat16_by_default, shape):
    model, again = (ramping(scale_warmup_steps=1000, scale_warmup_shape=shape) for _ in range(2))
    factors_of(model).step.fill_(332)
    factors_of(model).advance_ramp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(model.state_dict())
    assert factors_of(again).step == 333
    set_update_scale(again, f_of(model), ramp=True)
    assert factors_of(again).step == 333


def test_setting_f_needs_an_adapter_and_a_place_on_the_ramp():
    with pytest.raises(ValueError, match="no Dual LoRA adapter"):
        set_update_scale(nn.Linear(IN, OUT), 0.5)
    with pytest.raises(ValueError, match="factor=1.5"):
        set_update_scale(ramping(), 1.5, ramp=True)


def test_f_of_a_merged_model_is_not_set():
    model = ramping()
    for name in ("default", "other"):
        if name == "other":
            model.add_adapter("other", config(scale_warmup_steps=2))
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"an adapter is merged.*call unmerge_adapter\(\) before"):
            set_update_scale(model, 1.0)
        assert f_of(model, name) == 0.0
        model.unmerge_adapter()
    set_update_scale(model, 1.0)
    assert f_of(model) == 1.0


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("ramp", [True, False])
def test_f_is_a_finite_number(factor, ramp):
    with pytest.raises(ValueError, match=f"factor={factor}: expected a finite number"):
        set_update_scale(ramping(), factor, ramp)


TOLD = r"at f = 0.25, 1 of 4 steps into its ramp.*dual_lora.set_update_scale\(model, 1.0\), after unmerge_adapter\(\)"


def quarter(**fields):
    model = ramping(**fields)
    train_step(model, torch.optim.SGD(trained(model), lr=1e-3))
    return model


@pytest.fixture
def told():
    """Collects the lines about ramps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(w.message) for w in caught if " into its ramp" in str(w.message)]
    assert list_files(caught) <= {__file__}


def test_a_short_ramp_is_told_of_once_at_save_at_load_and_at_merge(told, tmp_path):
    model = quarter()
    base = Net(copy.deepcopy(layer_of(model).get_base_layer()))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    for _ in range(2):
        loaded.merge_adapter()
        loaded.unmerge_adapter()
    loaded.merge_and_unload()
    lines = told()
    assert [re.search("is (saved|loaded|merged) " + TOLD, line)[1] for line in lines] == ["saved", "loaded", "merged"]
    assert all("\n" not in line for line in lines)


def test_the_adapter_that_is_merged_is_the_one_told_of(told):
    model = quarter()
    model.add_adapter("full", config(scale_warmup_steps=0))
    copy.deepcopy(model).merge_and_unload(adapter_names=["full"])
    model.merge_adapter(["full"])
    assert told() == []
    model.set_adapter("full")
    model.merge_adapter(["default"])
    assert len(told()) == 1 and "'default' is merged at f = 0.25" in told()[0]


def test_nothing_is_told_at_full_scale_or_of_an_f_set_by_hand(told, tmp_path):
    for number, factor in enumerate((1.0, 0.3)):
        model = ramping()
        set_update_scale(model, factor)
        model.save_pretrained(tmp_path / str(number))
        PeftModel.from_pretrained(Net(nn.Linear(IN, OUT)), tmp_path / str(number)).merge_and_unload()
    assert told() == []


def test_checkpoints_and_going_on_are_not_told_of(told, tmp_path):
    model = quarter()
    model.save_pretrained(tmp_path / "checkpoint-1")
    PeftModel.from_pretrained(Net(nn.Linear(IN, OUT)), tmp_path / "checkpoint-1", is_trainable=True)
    assert told() == []
    model.save_pretrained(tmp_path / "last")
    assert len(told()) == 1


def test_the_default_ramp_is_over_in_a_run_of_twenty_steps():
    model = get_peft_model(Net(nn.Linear(IN, OUT)), DualLoraConfig(target_modules=["layer"]))
    x = torch.randn(3, IN)
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(model(x), base)
    optimizer = torch.optim.SGD(trained(model), lr=1e-3)
    for _ in range(20):
        train_step(model, optimizer)
    assert f_of(model) == 1.0


def test_the_count_survives_a_cast_of_the_model():
    model = ramping(scale_warmup_steps=1001)
    factors_of(model).step.fill_(999)
    model.bfloat16()
    factors_of(model).advance_ramp()
    assert factors_of(model).step == 1000


def test_the_callback_counts_steps_the_hook_cannot_see():
    model, callback = ramping(), DualLoraWarmupCallback()
    for _ in range(2):
        callback.on_step_begin(None, None, None, model=model)
        callback.on_step_end(None, None, None)
    assert f_of(model) == 0.5


def test_the_callback_adds_nothing_to_the_hook():
    model, callback = ramping(), DualLoraWarmupCallback()
    optimizer = torch.optim.SGD(trained(model), lr=1e-3)
    for _ in range(2):
        callback.on_step_begin(None, None, None, model=model)
        train_step(model, optimizer)
        callback.on_step_end(None, None, None)
    assert f_of(model) == 0.5


class SeveralKinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Embedding(IN, IN), nn.Linear(IN, OUT), nn.Conv1d(OUT, OUT, 1)

    def forward(self, ids):
        return self.c(self.b(self.a(ids)).transpose(-1, -2))


IDS = torch.arange(IN).view(2, -1)


def adapt_several_kinds(base=None):
    return get_peft_model(base or SeveralKinds(), config(target_modules=["a", "b", "c"], scale_warmup_steps=STEPS))


def train_several_kinds():
    model = adapt_several_kinds()
    set_update_scale(model, 1.0)
    return model


def copy_to_second_adapter(model):
    """As TRL makes its reference adapter: by the parameters, which leave out f."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


def list_lost(act) -> list[str]:
    """Return the lines that f was left out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    found = [w for w in caught if "while its f is 0" in str(w.message)]
    assert {w.filename for w in found} <= {__file__}
    return [str(w.message) for w in found]


def evaluate(model, training=False):
    model.train(training)
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize("training", [True, False])
def test_a_copy_of_the_parameters_alone_is_warned_about_once(training):
    model = train_several_kinds()
    expected = evaluate(model)
    copy_to_second_adapter(model)
    model.set_adapter("ref")
    (message,) = list_lost(lambda: evaluate(model, training))
    assert "dual_lora.set_update_scale(model, 1.0)" in message
    assert list_lost(lambda: evaluate(model, training)) == []
    set_update_scale(model, 1.0)
    assert torch.equal(evaluate(model), expected)


def test_f_of_0_that_is_meant_is_not_warned_about(tmp_path):
    fresh = adapt_several_kinds()
    assert list_lost(lambda: evaluate(fresh)) == []
    assert list_lost(lambda: evaluate(fresh.bfloat16().float())) == []
    fresh.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(SeveralKinds(), tmp_path)
    assert list_lost(lambda: evaluate(loaded)) == []
    set_by_hand = train_several_kinds()
    set_update_scale(set_by_hand, 0.0)
    assert list_lost(lambda: evaluate(set_by_hand)) == []
    ramped = ramping()
    train_step(ramped, torch.optim.SGD(trained(ramped), lr=1e-3))
    with torch.no_grad():
        assert list_lost(lambda: ramped(torch.randn(3, IN))) == []


@pytest.mark.parametrize("assign", [True, False])
def test_factors_loaded_without_f_are_at_full_scale(assign):
    base = SeveralKinds()
    again = adapt_several_kinds(copy.deepcopy(base))
    model = adapt_several_kinds(base)
    set_update_scale(model, 1.0)
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    again.load_state_dict(state, strict=False, assign=assign)
    assert list_lost(lambda: evaluate(again)) == []
    assert torch.equal(evaluate(again), evaluate(model))


def test_part_of_the_factors_leaves_f_as_it_is():
    model = ramping()
    factors = factors_of(model)
    factors.load_state_dict({"C": factors.C.detach() + 1}, strict=False)
    assert f_of(model) == 0.0


@pytest.mark.parametrize("adapted", [True, False])
def test_a_compiled_optimizer_step_is_compiled_once(adapted):
    """Also that of a model without an adapter: the hooks belong to all optimizers."""
    torch._dynamo.reset()
    model = ramping() if adapted else nn.Linear(IN, OUT)
    optimizer = torch.optim.SGD(trained(model), lr=1e-3)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for number in range(STEPS):
        model(torch.randn(3, IN)).square().sum().backward()
        with torch._dynamo.config.patch(error_on_recompile=number >= 2):
            step()
        optimizer.zero_grad(set_to_none=False)
    assert not adapted or f_of(model) == 1.0
