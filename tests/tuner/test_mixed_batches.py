"""One batch for several adapters: `adapter_names` in forward and generate, as LoRA has it."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from dual_lora import DualLoraConfig, set_update_scale
from dual_lora.tuner.warmup import list_factors
from tests.tuner.layers import IN, KINDS, OUT, Net, adapted, config, layer_of
from tests.tuner.tiny_llama import llama

IDS = torch.arange(1, 25).reshape(4, 6)
ROWS = ["default", "__base__", "other", "default"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def two(base, **fields):
    """Two adapters, of which the second adapts fewer layers."""
    model = get_peft_model(base, DualLoraConfig(r=4, init_std=0.3, **fields))
    targets = fields.get("target_modules")
    model.add_adapter("other", DualLoraConfig(**{"r": 6, "init_std": 0.3, **fields, "target_modules": targets[:1]}))
    set_update_scale(model, 0.7)
    return model.eval()


def each_alone(model, forward):
    """{adapter: the whole batch through that adapter}."""
    found = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        found[name] = forward()
    with model.disable_adapter():
        found["__base__"] = forward()
    model.set_adapter("default")
    return found


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind, fused", [*((kind, False) for kind in KINDS), ("linear", True), ("conv1d_gpt2", True)])
def test_every_kind_of_layer_takes_its_adapter_row_by_row(kind, grad, fused):
    slices = {"fused_slices": {"layer": [2, [1]]}} if fused else {}
    model = adapted(KINDS[kind].base(), **slices).eval()
    model.add_adapter("other", config(r1=1, r2=2))
    set_update_scale(model, 0.8)
    x = torch.cat([KINDS[kind].inputs()] * 4)[:4]
    with torch.set_grad_enabled(grad):
        alone = each_alone(model, lambda: model(x))
        mixed = model(x, adapter_names=ROWS)
    for row, name in enumerate(ROWS):
        torch.testing.assert_close(mixed[row], alone[name][row])
    assert torch.equal(mixed[1], alone["__base__"][1])
    assert not torch.allclose(mixed[0], alone["__base__"][0])
    assert not any(module._forward_pre_hooks for module in model.modules())


TARGETS = {"llama": ["q_proj", "embed_tokens", "lm_head"], "gpt2": ["c_attn", "wte", "c_fc"]}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2))


@pytest.mark.parametrize("name, make", [("llama", llama), ("gpt2", gpt2)])
def test_a_whole_model(name, make):
    model = two(make(), target_modules=TARGETS[name], task_type="CAUSAL_LM")
    with torch.no_grad():
        alone = each_alone(model, lambda: model(input_ids=IDS).logits)
        mixed = model(input_ids=IDS, adapter_names=ROWS).logits
    assert torch.equal(mixed[1], alone["__base__"][1])
    for row, of_row in enumerate(ROWS):
        torch.testing.assert_close(mixed[row], alone[of_row][row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_generate(beams, encoder_decoder):
    if encoder_decoder:
        fields = {"vocab_size": 64, "d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 2, "num_heads": 4}
        base = T5ForConditionalGeneration(T5Config(**fields, decoder_start_token_id=0))
        model = two(base, target_modules=["q", "wi"], task_type="SEQ_2_SEQ_LM")
    else:
        model = two(llama(), target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    with torch.no_grad():
        alone = each_alone(model, lambda: model.generate(input_ids=IDS, **options))
        mixed = model.generate(input_ids=IDS, adapter_names=ROWS, **options)
    for row, name in enumerate(ROWS):
        width = min(mixed.shape[1], alone[name].shape[1])  # others in the batch may go on for longer
        assert torch.equal(mixed[row, :width], alone[name][row, :width])
    assert not torch.equal(alone["default"], alone["__base__"])


def test_a_trained_head_goes_by_row_too():
    class WithHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(IN, OUT), nn.Linear(OUT, 2)

        def forward(self, x):
            return self.head(self.layer(x))

    model = two(WithHead(), target_modules=["layer"], modules_to_save=["head"])
    nn.init.normal_(model.base_model.model.head.modules_to_save["default"].weight)
    x = torch.randn(4, IN)
    alone = each_alone(model, lambda: model(x))
    mixed = model(x, adapter_names=ROWS)
    for row, name in enumerate(ROWS):
        torch.testing.assert_close(mixed[row], alone[name][row])


class Positions(nn.Embedding):
    """Takes the place of each word, by row or the same for all rows, besides the words."""

    def forward(self, ids, positions=None, steps=None):
        return super().forward(positions if steps is None else positions + steps)


def test_a_forward_of_its_own_takes_its_other_arguments_row_by_row():
    model = two(Net(Positions(IN, OUT)), target_modules=["layer"])
    model.base_model.model.forward = lambda ids, **kwargs: model.base_model.model.layer(ids, **kwargs)
    places = {"positions": torch.randint(0, 4, (4, 4)), "steps": torch.arange(4)}  # as long as the batch
    alone = each_alone(model, lambda: model(IDS[:, :4], **places))
    mixed = model(IDS[:, :4], **places, adapter_names=ROWS)
    for row, name in enumerate(ROWS):
        torch.testing.assert_close(mixed[row], alone[name][row])


class OneRow(nn.Embedding):
    """As BART's positions, of which one row is added to all rows of the batch."""

    def forward(self, ids):
        return super().forward(torch.arange(ids.shape[1])[None])


class NoRows(nn.Embedding):
    """As Whisper's positions, which have no dimension for rows."""

    def forward(self, ids):
        return self.weight[: ids.shape[1]]


class Shape(nn.Embedding):
    """As Marian's positions, which take the shape of the words."""

    def forward(self, shape):
        return super().forward(torch.arange(shape[1]))


@pytest.mark.parametrize("kind", [OneRow, NoRows, Shape])
def test_an_output_that_all_rows_share_is_refused(kind):
    model = two(Net(kind(IN, OUT)), target_modules=["layer"])
    ids = IDS[:, :4]  # as long as the batch
    x = ids.shape if kind is Shape else ids
    assert torch.equal(model(x, adapter_names=["__base__"] * 4), layer_of(model).base_layer(x))
    with pytest.raises(ValueError, match=f"adapter_names: {kind.__name__} has no output of its own for each row"):
        model(x, adapter_names=ROWS)


@pytest.mark.parametrize("fields", [{}, {"keep_update": True}], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_no_adapter_s_matrices_stay_in_memory(grad, fields):
    model = two(llama(), target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **fields)
    with torch.set_grad_enabled(grad):
        model(input_ids=IDS, adapter_names=ROWS)
    assert [f for f in list_factors(model) if f._cache is not None] == []
    with torch.no_grad():
        model(input_ids=IDS)
    assert sum(f._cache is not None for f in list_factors(model)) == 4  # of the active adapter


def test_16_bits_keep_their_dtype():
    model = two(llama().bfloat16(), target_modules=["q_proj"], task_type="CAUSAL_LM")
    with torch.no_grad():
        assert model(input_ids=IDS, adapter_names=ROWS).logits.dtype == torch.bfloat16


def test_disabled_adapters_stay_disabled():
    model, x = two(Net(nn.Linear(IN, OUT)), target_modules=["layer"]), torch.randn(4, IN)
    with model.disable_adapter():
        assert torch.equal(model(x, adapter_names=ROWS), layer_of(model).base_layer(x))


@pytest.mark.parametrize(
    "names, error, message",
    [
        (["default"], ValueError, "Length of `adapter_names` should be the same .* got 1 and 4"),
        (["default", "none", "other", "default"], ValueError, "non-existing adapter\\(s\\): none"),
        ("default", TypeError, "expected a list of str"),
    ],
)
def test_names_that_do_not_fit(names, error, message):
    model = two(Net(nn.Linear(IN, OUT)), target_modules=["layer"])
    with pytest.raises(error, match=message):
        model(torch.randn(4, IN), adapter_names=names)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_training_and_merged_adapters_are_refused():
    model, x = two(Net(nn.Linear(IN, OUT)), target_modules=["layer"]), torch.randn(4, IN)
    with pytest.raises(ValueError, match="in training mode"):
        copy.deepcopy(model).train()(x, adapter_names=ROWS)
    model.merge_adapter()
    with pytest.raises(ValueError, match="please call `unmerge_adapter` first"):
        model(x, adapter_names=ROWS)


def test_lora_s_activated_form_is_refused():
    model = two(Net(nn.Linear(IN, OUT)), target_modules=["layer"])
    with pytest.raises(ValueError, match="alora_offsets"):
        model(torch.randn(4, IN), alora_offsets=[1, 1, 1, 1])
