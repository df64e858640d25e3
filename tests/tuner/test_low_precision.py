"""What rounds the factors or their products to fewer bits than float32's, or scales the loss: others do it, and each
way warns once."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

from dual_lora import DualLoraConfig, set_update_scale
from dual_lora.functional import delta_weight
from dual_lora.tuner import precision
from tests.tuner.layers import list_files
from tests.tuner.tiny_llama import llama

RANK = 64  # CPUs that can round take small products in float32 all the same


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    before = torch.get_float32_matmul_precision()
    for cached in (precision._rounds_product, precision._warn_of_device):
        cached.cache_clear()
    yield
    torch.set_float32_matmul_precision(before)


def build_base(dtype=torch.float32):
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).to(dtype)


def adapted(dtype=torch.float32, autocast_adapter_dtype=True, **fields):
    config = DualLoraConfig(target_modules=["0", "1"], scale_warmup_steps=0, **{"r": 4, **fields})
    return get_peft_model(build_base(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)


def collect(act) -> list[str]:
    """Return the warnings of an action, all of which name the line of this file that acts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    assert {warning.filename for warning in caught} <= {__file__}
    return [str(warning.message) for warning in caught]


def train(model: torch.nn.Module, steps: int) -> list[str]:
    """Return the warnings of a short training."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def take_steps():
        for _ in range(steps):
            model(torch.ones(2, 8)).float().sum().backward()
            optimizer.step()

    return collect(take_steps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_factors_are_warned_about_once_and_not_after_the_remedy(dtype):
    model = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert train(model, 2) == []
    for p in trained:
        p.data = p.data.to(dtype)
    (message,) = train(model, 3)
    assert f"factors in {dtype}" in message and "p.data = p.data.float()" in message
    for p in trained:
        p.data, p.grad = p.data.float(), None
    assert train(model, 2) == []


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to"])
def test_a_cast_of_the_model_to_16_bits_is_warned_about_once(cast):
    model = adapted()
    arguments = [torch.bfloat16] if cast == "to" else []
    (message,) = collect(lambda: getattr(model, cast)(*arguments))
    dtype = torch.float16 if cast == "half" else torch.bfloat16
    assert f"this cast rounds the factors to {dtype}" in message and "reloading the adapter does" in message
    assert {p.dtype for p in model.parameters()} == {dtype}  # as the caller asked
    assert collect(lambda: getattr(model, cast)(*arguments)) == []
    assert collect(model.float) == []
    assert len(collect(lambda: getattr(model, cast)(*arguments))) == 1


def test_other_casts_and_moves_say_nothing():
    model = adapted()
    for act in (model.double, model.float, model.cpu, lambda: model.to("cpu", torch.float32), lambda: model.to("meta")):
        assert collect(act) == []
    assert collect(model.bfloat16) == []  # on the meta device there is nothing to round


@pytest.mark.parametrize("how", ["cast", "asked for"])
def test_factors_in_16_bits_are_saved_with_one_warning(how, tmp_path):
    if how == "cast":
        model = adapted()
        collect(model.bfloat16)
    else:
        models = []
        assert collect(lambda: models.append(adapted(dtype=torch.bfloat16, autocast_adapter_dtype=False))) == []
        (model,) = models
    (message,) = save(model, tmp_path)
    assert "is saved with factors in bfloat16. If they were trained in float32" in message
    assert save(model, tmp_path) == []


@pytest.mark.parametrize("options", [{}, {"safe_serialization": False}], ids=str)
def test_warnings_of_a_save_are_of_the_model_whatever_the_folder_holds(options, tmp_path):
    """transformers writes the config before the weights."""

    def build_config():
        return DualLoraConfig(r=4, target_modules=["q_proj"])

    model, config = llama(), build_config()
    model.add_adapter(config)
    (message,) = save(model, tmp_path)
    assert "is saved at f = 0, 0 of 10 steps into its ramp" in message
    (message,) = save(get_peft_model(llama(), build_config()), tmp_path, **options)
    assert "is saved at f = 0" in message
    again, config = llama(), build_config()
    again.add_adapter(config)
    set_update_scale(again, 1.0)
    other = get_peft_model(llama(), config)  # at f = 0, of the same config
    assert save(again, tmp_path) == [] and other is not None
    collect(again.bfloat16)
    (message,) = save(again, tmp_path)
    assert "is saved with factors in bfloat16" in message


def save(model, folder, **options) -> list[str]:
    """Return our warnings of a save."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(folder, **options)
    assert list_files(caught) <= {__file__}
    return [str(warning.message) for warning in caught if "Dual LoRA" in str(warning.message)]


def test_factors_in_float32_are_saved_and_loaded_without_a_warning(tmp_path):
    assert save(adapted(dtype=torch.bfloat16), tmp_path) == []
    assert collect(lambda: PeftModel.from_pretrained(build_base(), tmp_path)) == []


def test_loading_that_rounds_the_factors_warns_once(tmp_path):
    def load(**options):
        return PeftModel.from_pretrained(build_base(torch.bfloat16), tmp_path, **options)

    model = adapted(init_weights=False)
    assert save(model, tmp_path) == []
    assert collect(load) == []
    (message,) = collect(lambda: load(autocast_adapter_dtype=False))
    assert "autocast_adapter_dtype=False rounds the factors of adapter 'default'" in message
    for factor in model.parameters():
        factor.data = factor.data.bfloat16().float()  # as if trained in 16 bits
    assert save(model, tmp_path) == []
    assert collect(lambda: load(autocast_adapter_dtype=False)) == []


OCCASIONS = {
    "train": lambda model: collect(model.train),
    "eval": lambda model: collect(model.eval),
    "step": lambda model: train(model, 2),
    "merge": lambda model: collect(model.merge_adapter),
    "unload": lambda model: collect(lambda: model.merge_and_unload()),
}


@pytest.mark.parametrize("occasion", OCCASIONS)
def test_products_that_the_device_rounds_are_warned_about_once(occasion, monkeypatch):
    monkeypatch.setattr(precision, "_rounds_product", lambda device, rank, setting: rank == RANK)
    small, model = adapted(), adapted(r1=2, r2=RANK, r=None, init_std=0.1)
    torch.set_float32_matmul_precision("high")
    assert OCCASIONS["train"](small) == []
    (message,) = OCCASIONS[occasion](model)
    assert "float32 products on cpu in fewer bits" in message and 'set_float32_matmul_precision("highest")' in message
    assert OCCASIONS["eval"](model) == []


@pytest.mark.parametrize("fields", [{"direction": "tanh"}, {"direction_dtype": "bfloat16"}], ids=["tanh", "16 bits"])
def test_maps_without_exact_signs_say_nothing_of_rounded_products(fields, monkeypatch):
    monkeypatch.setattr(precision, "_rounds_product", lambda device, rank, setting: True)
    torch.set_float32_matmul_precision("high")
    model = adapted(**fields)
    assert OCCASIONS["train"](model) == [] and OCCASIONS["train"](adapted().double()) == []


def test_the_default_setting_takes_no_product(monkeypatch):
    def refuse(device, rank, setting):
        raise AssertionError("multiplied")

    monkeypatch.setattr(precision, "_rounds_product", refuse)
    assert all(act(adapted()) == [] for act in OCCASIONS.values())


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="before torch 2.9")
def test_a_setting_of_one_device_alone_is_read():
    """torch.get_float32_matmul_precision raises then."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    assert any(name not in precision.EXACT for name in precision._read_setting())
    assert len(OCCASIONS["train"](adapted(r=2 * RANK))) == precision._rounds_product(
        torch.device("cpu"), RANK, precision._read_setting()
    )


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
@pytest.mark.parametrize("rank", [4, RANK])
def test_the_warning_comes_where_this_processor_flips_signs(setting, rank):
    draw = torch.Generator().manual_seed(0)
    factors = [torch.randn(shape, generator=draw) for shape in ((rank, 512), (512, rank)) * 2]
    exact = delta_weight(*factors, 1.0)
    torch.set_float32_matmul_precision(setting)
    flipped = not torch.equal(delta_weight(*factors, 1.0).sign(), exact.sign())
    assert len(OCCASIONS["eval"](adapted(r=2 * rank))) == flipped


def test_a_compiled_model_stays_one_graph_under_such_a_setting(monkeypatch):
    monkeypatch.setattr(precision, "_rounds_product", lambda device, rank, setting: True)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.reset()
    model = adapted(r=8)
    compiled = torch.compile(model.base_model.model, backend="eager", fullgraph=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def take_step():
        model.train()
        compiled(torch.ones(2, 8)).sum().backward()
        optimizer.step()

    assert len(collect(take_step)) == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert collect(take_step) == []


def train_with_scaler(model, **options) -> list[str]:
    """Return the warnings of three steps with loss scaling."""
    scaler = torch.amp.GradScaler("cpu", **{"init_scale": 1024.0, **options})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def take_steps():
        for _ in range(3):
            scaler.scale(model(torch.ones(2, 8)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()

    return collect(take_steps)


def test_a_scaled_loss_is_warned_about_once_where_the_gradient_is_clipped():
    (message,) = train_with_scaler(adapted())
    assert "the loss is scaled by 1024" in message and "ste='identity'" in message
    for fields in ({"ste": "identity"}, {"direction": "tanh"}, {"freeze": "direction"}):
        assert train_with_scaler(adapted(**fields)) == []
    assert train_with_scaler(adapted(), enabled=False) == []
    assert train_with_scaler(adapted(), init_scale=1.0) == []
