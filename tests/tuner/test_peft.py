"""What users do with LoRA in PEFT, and how the package enters PEFT."""

import copy
import os
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from dual_lora import DualLoraConfig, DualLoraModel, set_update_scale
from dual_lora.tuner.register import add_peft_type, register_method
from dual_lora.tuner.warmup import list_factors
from tests.tuner.layers import list_files
from tests.tuner.tiny_llama import llama

IDS = torch.arange(1, 25).reshape(2, 12)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def nontrivial(model, seed=0):
    """Factors that matter, at f = 0.7."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "dual_lora_factors" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    set_update_scale(model, 0.7)
    return model


def adapted(base, **fields):
    return nontrivial(get_peft_model(base, DualLoraConfig(r=4, task_type="CAUSAL_LM", **fields))).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_unloading_keeps_a_trained_head_of_several_layers():
    """RoBERTa's classification head is one: a module with layers but no weight of its own."""

    class WithHead(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 6)
            self.head = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2))

        def forward(self, x):
            return self.head(self.layer(x))

    model = get_peft_model(WithHead(), DualLoraConfig(r=2, target_modules=["layer"], modules_to_save=["head"]))
    with torch.no_grad():
        [p.add_(0.3) for p in model.parameters() if p.requires_grad]
    set_update_scale(model, 1.0)
    x = torch.randn(3, 6)
    expected = model(x)
    merged = model.merge_and_unload()
    assert isinstance(merged.head, torch.nn.Sequential)
    assert torch.allclose(merged(x), expected, atol=1e-5)


def test_switching_and_deleting_adapters():
    base = llama()
    expected = logits(base)
    model = adapted(base)
    first = logits(model)
    model.add_adapter("second", DualLoraConfig(r=6, magnitude_ratio=0.3, target_modules=["o_proj"]))
    torch.manual_seed(1)
    for layer in model.base_model.model.model.layers:
        for factor in layer.self_attn.o_proj.dual_lora_factors["second"].parameters():
            torch.nn.init.normal_(factor, std=0.2)
    set_update_scale(model, 0.7)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(first, second, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    assert not [name for name in model.state_dict() if "default" in name]
    assert torch.equal(logits(model.unload()), expected)


def test_save_and_load(tmp_path):
    base = llama()
    model = adapted(copy.deepcopy(base), modules_to_save=["lm_head"], rank_pattern={"v_proj": 8})
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(1.5)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    q_proj = "base_model.model.model.layers.0.self_attn.q_proj.dual_lora_factors."
    assert {k.removeprefix(q_proj) for k in saved if k.startswith(q_proj)} == {*"ABCD", "step", "update_scale"}
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(again), expected)
        again.load_adapter(tmp_path, "twice", low_cpu_mem_usage=low_cpu_mem_usage)
        again.set_adapter("twice")
        assert torch.equal(logits(again), expected)


@pytest.mark.skipif(not hasattr(BaseTuner, "_get_adapter_state_dict"), reason="asks the method since peft 0.21")
def test_saving_a_merged_embedding_is_told_of(tmp_path):
    base = llama()
    model = adapted(copy.deepcopy(base), target_modules=["embed_tokens", "q_proj"])
    expected = logits(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="embed_tokens is merged while saving") as found:
        model.save_pretrained(tmp_path)
    assert list_files(found) == {__file__}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*merged while saving")
        model.unmerge_adapter()
        model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path)), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_single_tokens_train_along(tied, tmp_path):
    base = llama(tie_word_embeddings=tied)
    model = adapted(copy.deepcopy(base), target_modules=["q_proj"], trainable_token_indices=[int(IDS[0, 0])])
    without = logits(model)
    (delta,) = (p for n, p in model.named_parameters() if "trainable_tokens_delta" in n and p.requires_grad)
    with torch.no_grad():
        delta.add_(0.5)
    expected = logits(model)
    assert not torch.allclose(expected[0], without[0], atol=1e-3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(again), expected)
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(base))
    torch.testing.assert_close(logits(again.merge_and_unload()), expected)


@pytest.mark.parametrize("asked", ["none", "all", "dual_lora_only"])
def test_biases_train_and_are_saved_as_with_lora(asked, tmp_path):
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16)).eval()
    model = adapted(copy.deepcopy(base), target_modules=["c_proj"], bias=asked)
    like = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["c_proj"], bias=asked.replace("dual_", "")))
    biases = {n: p for n, p in model.named_parameters() if n.endswith(".bias") and p.requires_grad}
    assert biases.keys() == {n for n, p in like.named_parameters() if n.endswith(".bias") and p.requires_grad}
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for bias in biases.values():
            bias.sub_(0.1 * bias.grad.sign())
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(again), expected)
    torch.testing.assert_close(logits(again.merge_and_unload()), expected)


def test_single_tokens_of_an_adapted_embedding_are_refused():
    with pytest.raises(TypeError, match="trainable_token_indices cannot be applied"):
        adapted(llama(), target_modules=["embed_tokens"], trainable_token_indices=[1])


@pytest.mark.parametrize("name", ["A", "D", "step"])
def test_an_adapter_with_the_name_of_a_factor_is_refused(name):
    """PEFT would leave the factors of that name out of every other adapter that it saves."""
    model = adapted(llama())
    with pytest.raises(ValueError, match=f"adapter_name='{name}': .* take another"):
        model.add_adapter(name, DualLoraConfig())
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="take another"):
        get_peft_model(llama(), DualLoraConfig(), adapter_name=name)


def test_the_model_card_says_how_to_load(tmp_path):
    model = adapted(llama())
    model.add_adapter("second", DualLoraConfig(r=4))
    card = tmp_path / "README.md"
    for _ in range(2):  # the second time on the card of the first
        model.save_pretrained(tmp_path)
        text, tags = card.read_text(), ModelCard.load(card).data.tags
        assert text.count("## Loading this adapter") == 1 and "import dual_lora" in text
        assert {"dual-lora", "peft", "transformers"} <= set(tags)
    card.write_text("---\nlibrary_name: peft\n---\n\nMy own words.\n")
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert "My own words." in card.read_text() and "import dual_lora" in card.read_text()
    assert not (tmp_path / "second" / "README.md").exists()


@pytest.mark.parametrize(
    "content", [b"---\nfoo: [\n---\nnotes", b"\xff\xfe \xe9", b"---\n- 1\n---\n"], ids=["yaml", "latin", "list"]
)
def test_a_card_that_cannot_be_read_costs_no_weights(tmp_path, content):
    model, card = llama(), tmp_path / "README.md"
    model.add_adapter(DualLoraConfig(r=4, target_modules=["q_proj"], init_weights=False))
    card.write_bytes(content)
    with pytest.warns(UserWarning, match="README.md is left without how to load the adapter"):
        model.save_pretrained(tmp_path)
    assert card.read_bytes() == content
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}


def test_tags_of_any_form_are_kept(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlibrary_name: peft\ntags: mine\n---\n\nMy own words.\n")
    DualLoraConfig().save_pretrained(tmp_path)
    assert {"mine", "dual-lora"} <= set(ModelCard.load(card).data.tags)


def test_the_card_of_another_adapter_above_is_left_alone(tmp_path):
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_bytes()
    model = llama()
    model.add_adapter(DualLoraConfig(r=4, target_modules=["q_proj"], init_weights=False))
    for _ in range(2):
        model.save_pretrained(tmp_path / "variant")
        assert (tmp_path / "README.md").read_bytes() == before


def test_no_card_but_peft_s_is_written_to(tmp_path):
    (tmp_path / "README.md").write_text("A project.\n")
    DualLoraConfig().save_pretrained(tmp_path / "adapter")
    DualLoraConfig().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "A project.\n"
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_config.json"}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_on_a_bf16_base_keeps_every_bit_of_the_factors(tmp_path, low_cpu_mem_usage):
    base = llama().bfloat16()
    model = adapted(copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    trained = {k: v for k, v in model.state_dict().items() if "dual_lora" in k}
    assert len(trained) == 2 * 2 * 6 and all(torch.equal(again.state_dict()[k], v) for k, v in trained.items())


def test_adapters_on_a_meta_model_take_no_memory_and_load(tmp_path):
    model = adapted(llama())
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = llama()
    shapes = get_peft_model(empty, DualLoraConfig(r=4))
    assert {p.device.type for p in shapes.parameters()} == {"meta"}
    assert shapes.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_transformers_and_auto_classes_load_the_adapter(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()), expected)


@pytest.mark.filterwarnings("ignore:Dual LoRA adapter")
def test_an_adapter_loads_on_a_base_whose_layers_are_on_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT writes the layers' files again, below the working directory
    llama().save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), scale_warmup_steps=10)
    set_update_scale(model, 0.3, ramp=True)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "lm_head": "cpu"}
    folders = {"device_map": places, "offload_folder": tmp_path / "first"}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **folders)
    places = {f"base_model.model.{name}": place for name, place in places.items()}
    again = PeftModel.from_pretrained(
        base, tmp_path / "adapter", device_map=places, offload_folder=str(tmp_path / "then")
    )
    assert {p.device.type for p in again.parameters()} == {"cpu", "meta"}
    torch.testing.assert_close(logits(again), expected)
    assert {(int(f.step), round(float(f.update_scale), 6)) for f in list_factors(again)} == {(3, 0.3)}
    torch.testing.assert_close(logits(again.merge_and_unload()), expected)


def test_merge_and_unload_of_a_whole_model(tmp_path):
    model = adapted(llama(), target_modules="all-linear")
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert (logits(merged) - expected).norm() < 1e-5 * expected.norm()
    assert not [name for name, _ in merged.named_modules() if "dual_lora" in name]
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(merged))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2))


def test_gpt2_default_targets_are_its_fused_conv1d():
    model = adapted(gpt2())
    expected = logits(model)
    assert model.base_model.targeted_module_names == [f"transformer.h.{i}.attn.c_attn" for i in range(2)]
    assert (logits(model.merge_and_unload()) - expected).norm() < 1e-5 * expected.norm()


def test_gpt2_query_and_value_slices(tmp_path):
    base = gpt2()
    model = adapted(copy.deepcopy(base), fused_slices={"c_attn": [3, [0, 2]]})
    # LoRA of rank 4 on a 32 -> 32 query and a 32 -> 32 value in each of 2 layers
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * 4 * (32 + 32)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(model))


@pytest.mark.parametrize(
    "targets, n",
    [({"target_modules": ["q_proj", "mlp.up_proj"]}, 4), ({"target_modules": r".*layers\.1\..*_proj"}, 7)]
    + [({"target_modules": "all-linear"}, 14), ({"target_modules": "all-linear", "exclude_modules": ["q_proj"]}, 12)]
    + [({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1)],
)
def test_targets(targets, n):
    assert len(adapted(llama(), **targets).base_model.targeted_module_names) == n


def test_rank_and_alpha_patterns_hold_for_every_adapter():
    fields = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 6}, "alpha_pattern": {"v_proj": 3}}
    model = adapted(llama(), **fields)
    model.add_adapter("second", DualLoraConfig(r=4, lora_alpha=8, **fields))
    attention = model.base_model.model.model.layers[0].self_attn
    for name, alpha in (("default", 16), ("second", 8)):
        q, v = attention.q_proj.dual_lora_factors[name], attention.v_proj.dual_lora_factors[name]
        assert (q.A.shape[0], v.A.shape[0]) == (2, 3)
        assert q.scaling == alpha / 2 and v.scaling == 3 / 3


@pytest.mark.parametrize("r, ratio", [(2, 0.5), (7, 0.3), (16, 0.75)])
def test_budget_is_lora_s_parameter_count(r, ratio):
    targets = ["q_proj", "down_proj", "lm_head", "embed_tokens"]
    dual = get_peft_model(llama(), DualLoraConfig(r=r, magnitude_ratio=ratio, target_modules=targets))
    lora = get_peft_model(llama(), LoraConfig(r=r, target_modules=targets))
    assert dual.get_nb_trainable_parameters()[0] == lora.get_nb_trainable_parameters()[0]


@pytest.mark.skipif(not hasattr(peft, "convert_to_lora"), reason="this peft has no convert_to_lora")
def test_conversion_to_lora_is_lossy_below_full_rank():
    """dW has full rank: LoRA of the same budget keeps a part of it, only LoRA of the layer's rank keeps it all."""
    model = adapted(llama(), target_modules=["q_proj"])
    dW = model.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("default")
    assert torch.linalg.matrix_rank(dW) > 28  # of 32, from r = 4
    errors = {}
    for rank in (4, 32):
        _, state = peft.convert_to_lora(model, rank=rank)
        A, B = (state[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{n}.weight"] for n in "AB")
        errors[rank] = ((B @ A - dW).norm() / dW.norm()).item()
    assert errors[4] > 0.3 and errors[32] < 1e-3


def test_registration_is_idempotent():
    before = list(PeftType)
    register_method(DualLoraConfig, DualLoraModel)
    assert list(PeftType) == before and before.count("DUAL_LORA") == 1
    member = add_peft_type("DUAL_LORA")
    assert member is PeftType.DUAL_LORA is PeftType("DUAL_LORA") and member.value == "DUAL_LORA"
    assert copy.deepcopy(member) is member


def test_a_foreign_method_of_that_name_is_an_error():
    with pytest.raises(RuntimeError, match="already knows a method DUAL_LORA: dual_lora.tuner.config.DualLoraConfig"):
        register_method(LoraConfig, DualLoraModel)


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_lazy_import_loads_neither_torch_nor_peft():
    code = "import sys, dual_lora; print('torch' in sys.modules, 'peft' in sys.modules); "
    code += "from dual_lora import DualLoraConfig; print(DualLoraConfig().peft_type.value)"
    assert python(code, DUAL_LORA_LAZY="1").split() == ["False", "False", "DUAL_LORA"]


def test_every_public_name_resolves():
    import dual_lora

    for name in dual_lora.__all__:
        assert getattr(dual_lora, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        dual_lora.no_such_name  # noqa: B018


def test_importing_registers_and_costs_little_more_than_peft():
    code = "import gc, time, peft; gc.disable(); t = time.process_time(); import dual_lora; "
    code += "print(time.process_time() - t, 'DUAL_LORA' in list(peft.PeftType))"
    seconds, registered = python(code, DUAL_LORA_LAZY="").split()
    assert float(seconds) < 0.2 and registered == "True"
