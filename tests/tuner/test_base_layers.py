"""What the base layer or its parent does with the weight: the adapter follows it, or says that it cannot."""

import copy
import inspect
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from peft import get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Florence2Config,
    Florence2ForConditionalGeneration,
    JambaConfig,
    JambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForXVector,
)

from dual_lora import DualLoraConfig, delta_weight, set_update_scale
from dual_lora.tuner.bypass import find_use
from dual_lora.tuner.layer import has_plain_forward
from tests.tuner.layers import IN, OUT, Net, adapted, config, factors_of, layer_of, list_files, relative_error

SCALE = 0.8 * 7 / 8**0.5  # f * alpha / sqrt(r1 * r2) of layers.adapted


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def dW_of(model):
    f = factors_of(model)
    return delta_weight(f.A, f.B, f.C, f.D, SCALE)


# Parents


class ReadsWeight(nn.Module):
    """Computes with its child's weight and never calls the child."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(IN, IN)
        self.layer = nn.Linear(IN, OUT)

    def forward(self, x):
        return F.linear(self.before(x), self.layer.weight, self.layer.bias)


class ReadsDtype(ReadsWeight):
    """As T5 does: asks the weight for its dtype, and calls the layer."""

    def forward(self, x):
        if isinstance(self.layer.weight, torch.Tensor):
            x = x.to(self.layer.weight.dtype)
        return self.layer(self.before(x))


class Both(ReadsWeight):
    def forward(self, x):
        return self.layer(x) + x @ self.layer.weight.T


def mamba(cls=MambaForCausalLM, config_cls=MambaConfig, **fields):
    return cls(config_cls(vocab_size=99, hidden_size=32, num_hidden_layers=2, **fields))


def jamba():
    fields = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32, "num_experts": 2}
    fields |= {"mamba_d_state": 4, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1}
    return mamba(JambaForCausalLM, JambaConfig, **fields)


def x_vector():
    return Wav2Vec2ForXVector(
        Wav2Vec2Config(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=(16, 16),
            conv_kernel=(4, 4),
            conv_stride=(2, 2),
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            num_feat_extract_layers=2,
            vocab_size=32,
            tdnn_dim=(16, 16),
            tdnn_kernel=(3, 3),
            tdnn_dilation=(1, 1),
            xvector_output_dim=8,
        )  # fmt: skip
    )


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=99, d_model=32, d_ff=37, d_kv=8, num_layers=1, num_heads=4, decoder_start_token_id=0)
    )


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.proj(self.attention(x, x, x, need_weights=False)[0])


IDS = torch.arange(1, 9).view(1, 8)
BYPASSED = {
    "reads": (ReadsWeight, lambda: {"x": torch.randn(3, IN)}, ["layer", "before"], "layer"),
    "attention": (Attention, lambda: {"x": torch.randn(2, 5, 8)}, ["out_proj", "proj"], "out_proj"),
    "tdnn": (x_vector, lambda: {"input_values": torch.randn(2, 400)}, ["kernel", "projector"], "kernel"),
    "jamba": (jamba, lambda: {"input_ids": IDS}, ["conv1d", "in_proj"], "conv1d"),
    "t5": (t5, lambda: {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}, ["shared", "q"], "shared"),
}


def output(model, inputs):
    with torch.no_grad():
        found = model(**inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("forward_first", [True, False])
@pytest.mark.parametrize("name", BYPASSED)
def test_factors_that_no_forward_uses_are_told_of_and_never_merged(name, forward_first):
    make, inputs, targets, dead = BYPASSED[name]
    base, inputs = make().eval(), inputs()
    if name == "jamba" and "self.conv1d(" in inspect.getsource(type(base.model.layers[0].mamba)):
        pytest.skip("Jamba of this release of transformers calls its convolution")
    with pytest.warns(UserWarning, match=rf"Dual LoRA: .*{dead}.* never called by the parent") as found:
        model = get_peft_model(base, config(target_modules=targets, init_weights=False)).eval()
    assert list_files(found) == {__file__}
    y = output(model, inputs) if forward_first else None
    with pytest.warns(UserWarning, match=rf"{dead}.* not merged") as found:
        merged = copy.deepcopy(model).merge_and_unload()
    assert list_files(found) == {__file__}
    y = output(model, inputs) if y is None else y
    assert (output(merged, inputs) - y).abs().max() < 1e-4 * y.abs().max().clamp(min=1)


def test_mamba_s_convolution_is_refused_as_for_lora():
    for target in ("conv1d", "out_proj"):
        with pytest.raises(ValueError, match="PEFT:DUAL_LORA.*incompatible with Mamba-based models"):
            get_peft_model(mamba(), DualLoraConfig(target_modules=["in_proj", target]))
    get_peft_model(mamba(), DualLoraConfig(target_modules=["in_proj"]))


def test_a_layer_that_is_called_after_all_is_merged():
    """Its parent never does, but somebody else."""
    model = get_peft_model(ReadsWeight(), config(init_weights=False))
    layer = model.base_model.model.layer
    assert layer.bypassed
    x = torch.randn(3, IN)
    y = layer(x)
    assert not layer.bypassed
    layer.merge()
    torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("parent", [ReadsDtype, nn.Sequential])
def test_asking_for_the_dtype_is_no_bypass(parent):
    base = ReadsDtype() if parent is ReadsDtype else Net(nn.Sequential(nn.Linear(IN, OUT)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(base, config(target_modules=["layer" if parent is ReadsDtype else "0"]))
    assert all(not module.bypassed for module in model.modules() if hasattr(module, "bypassed"))


def test_a_parent_that_also_reads_the_weight_is_told_of():
    with pytest.warns(UserWarning, match="layer is called in some places; in others its weight") as found:
        get_peft_model(Both(), config())
    assert list_files(found) == {__file__}


def test_a_class_without_source_says_nothing():
    scope = {"nn": nn, "F": F}
    exec("class Made(nn.Module):\n def forward(self, x):\n  return F.linear(x, self.layer.weight)", scope)
    assert find_use(scope["Made"](), "layer") == (False, False)


@pytest.mark.parametrize("mask", [None, torch.tensor([[False] * 5, [False] * 3 + [True] * 2])])
def test_the_encoder_layer_s_fast_path_is_left(mask):
    """nn.TransformerEncoderLayer computes with the weights of linear1 and linear2 in evaluation, in one operation."""
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 1).eval()
    x = torch.randn(2, 5, 8)
    plain = base(x, src_key_padding_mask=mask)
    model = get_peft_model(base, config(target_modules=["linear1", "linear2"], init_weights=False)).eval()
    valid = slice(None) if mask is None else ~mask
    with torch.no_grad():
        evaluated = model(x, src_key_padding_mask=mask)[valid]
    expected = model(x, src_key_padding_mask=mask)[valid]
    torch.testing.assert_close(evaluated, expected)
    assert relative_error(evaluated, plain[valid]) > 0.01
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(x, src_key_padding_mask=mask)[valid], expected)


# Embeddings


def test_the_padding_row_stays_as_it_is():
    base = nn.Embedding(IN, OUT, padding_idx=3)
    nn.init.normal_(base.weight)
    model, ids = adapted(copy.deepcopy(base)).eval(), torch.arange(IN)
    dW = dW_of(model).T.clone()
    assert dW[3].any()
    dW[3] = 0
    y = model(ids)
    torch.testing.assert_close(y, base.weight + dW)
    assert torch.equal(y[3], base.weight[3])
    torch.testing.assert_close(layer_of(model).get_delta_weight("default"), dW)
    assert torch.equal(model.merge_and_unload().layer.weight[3], base.weight[3])


@pytest.mark.parametrize("kernel", ["eager", "recompute"])
def test_padding_gets_no_gradient_and_frequency_divides_it(kernel):
    base = nn.Embedding(IN, OUT, padding_idx=3, scale_grad_by_freq=True)
    model = adapted(base, kernel=kernel, ste="identity")
    ids = torch.tensor([[1, 3, 1, 4], [1, 5, 3, 3]])
    g = torch.randn(2, 4, OUT)
    (model(ids) * g).sum().backward()
    f = {n: getattr(factors_of(model), n).detach().clone().requires_grad_() for n in "ABCD"}
    table = delta_weight(**f, scale=SCALE, ste="identity").T
    (F.embedding(ids, table, padding_idx=3, scale_grad_by_freq=True) * g).sum().backward()
    for n in "ABCD":
        torch.testing.assert_close(getattr(factors_of(model), n).grad, f[n].grad)


@pytest.mark.parametrize("kernel", ["eager", "recompute"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
def test_an_empty_batch_has_an_empty_output_and_no_gradient(kernel, shape):
    model = get_peft_model(Net(nn.Embedding(20, 6)), config(kernel=kernel))
    outputs = model(torch.zeros(*shape, dtype=torch.long))
    assert outputs.shape == (*shape, 6)
    outputs.sum().backward()
    assert all(weight.grad.count_nonzero() == 0 for weight in model.parameters() if weight.requires_grad)


def test_max_norm_limits_the_sum():
    base = nn.Embedding(IN, OUT, max_norm=0.7)
    model, ids = adapted(copy.deepcopy(base)).eval(), torch.arange(IN)
    y = model(ids)
    assert y.norm(dim=-1).max() < 0.7 + 1e-5
    start = torch.renorm(base.weight.detach(), 2, 0, 0.7)
    torch.testing.assert_close(y, torch.renorm(start + dW_of(model).T, 2, 0, 0.7))
    fresh = adapted(copy.deepcopy(base)).eval()  # no row was looked up before the merge
    layer_of(fresh).dual_lora_factors.load_state_dict(layer_of(model).dual_lora_factors.state_dict())
    fresh.merge_adapter()
    torch.testing.assert_close(fresh(ids), y)
    fresh.unmerge_adapter()
    torch.testing.assert_close(fresh(ids), y)


# Base layers with a forward of their own


class Shifted(nn.Embedding):
    """As OPT's positions: looks up two rows further on."""

    def forward(self, ids):
        return super().forward(ids + 2)


class Causal(nn.Conv1d):
    """Pads on the left before it convolves."""

    def forward(self, x):
        return super().forward(F.pad(x, (2, 0)))


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


class Rewritten(nn.Linear):
    """As Falcon's: its own words for the same thing."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


OWN = {
    "embedding": (lambda: Shifted(IN, OUT), lambda: torch.arange(IN - 2)),
    "conv": (lambda: Causal(4, OUT, 3), lambda: torch.randn(2, 4, 9)),
    "linear": (lambda: Halved(IN, OUT), lambda: torch.randn(3, IN)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OWN)
def test_a_forward_of_its_own_sees_the_sum(name, dtype):
    make, inputs = OWN[name]
    base, x = make(), inputs()
    x = x.to(dtype) if x.is_floating_point() else x
    model = adapted(base, dtype=dtype)
    merged = copy.deepcopy(model).float().merge_and_unload()
    expected = merged(x.float() if x.is_floating_point() else x)
    y = model(x)
    assert y.dtype == dtype and relative_error(y, expected) < (1e-5 if dtype == torch.float32 else 0.01)
    y.sum().backward()
    assert all(p.grad.any() for p in factors_of(model).parameters())
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))


class OfShape(nn.Embedding):
    """As ProphetNet's positions: takes a shape and returns the positions, too."""

    def forward(self, shape):
        positions = torch.arange(shape[1])
        return super().forward(positions), positions


def test_a_forward_of_its_own_may_take_a_shape_and_return_several_values():
    model = adapted(OfShape(IN, OUT), dtype=torch.bfloat16)
    rows, positions = model(torch.Size([2, 5]))
    weight = layer_of(model).weight.float() + dW_of(model).T
    assert rows.dtype == torch.bfloat16 and torch.equal(positions, torch.arange(5))
    assert relative_error(rows, weight[:5]) < 0.01


class ReadsStride(nn.Module):
    """As Whisper's encoder, which computes with the strides of its convolutions."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv1d(4, OUT, 3, stride=2)

    def forward(self, x):
        return self.layer(x)[..., : x.shape[-1] // self.layer.stride[0] - self.layer.kernel_size[0]]


def test_a_parent_may_read_the_settings_of_a_layer():
    base, x = ReadsStride(), torch.randn(2, 4, 11)
    expected = base(x)
    assert torch.equal(get_peft_model(base, config())(x), expected)
    assert adapted(nn.Embedding(IN, OUT, padding_idx=3)).base_model.model.layer.padding_idx == 3


def test_the_same_in_other_words_is_a_plain_layer():
    assert has_plain_forward(Rewritten(IN, OUT)) and not has_plain_forward(Halved(IN, OUT))
    assert has_plain_forward(nn.Linear(IN, OUT)) and not has_plain_forward(Causal(4, OUT, 3))


def test_dropout_cannot_be_had_of_a_forward_of_its_own():
    with pytest.raises(ValueError, match="lora_dropout=0.1: Causal has a forward of its own"):
        adapted(Causal(4, OUT, 3), lora_dropout=0.1)


COMPUTED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "old_weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrized": lambda m: nn.utils.parametrize.register_parametrization(m, "weight", nn.Tanh()) or m,
    "pruned": lambda m: nn.utils.prune.l1_unstructured(m, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("make", [lambda: nn.Linear(IN, OUT), lambda: nn.Conv1d(IN, OUT, 1)], ids=["linear", "conv"])
def test_a_computed_weight_is_adapted_and_merging_into_it_refused(make, name):
    base = COMPUTED[name](make()).eval()
    x = torch.randn(3, IN) if isinstance(base, nn.Linear) else torch.randn(2, IN, 4)
    model = adapted(base).eval()
    term = dW_of(model)
    expected = base(x) + (F.linear(x, term) if isinstance(base, nn.Linear) else F.conv1d(x, term.unsqueeze(-1)))
    torch.testing.assert_close(model(x), expected)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="layer: cannot merge into .*computed from other tensors"):
            merge()
    torch.testing.assert_close(model(x), expected)


class ScaledFloat8(nn.Linear):
    """As transformers' FP8Linear: the weight has 8 bits an entry and is scaled when it is used."""

    def __init__(self) -> None:
        super().__init__(IN, OUT)
        self.scale = self.weight.abs().max().item() / 448
        self.weight = nn.Parameter((self.weight.data / self.scale).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.float() * self.scale, self.bias)


def test_a_weight_of_8_bits_is_adapted_and_merging_into_it_refused():
    base, x = ScaledFloat8(), torch.randn(3, IN)
    model = get_peft_model(Net(base), config()).eval()
    set_update_scale(model, 0.8)
    expected = base(x) + F.linear(x, dW_of(model))
    torch.testing.assert_close(model(x), expected)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match="layer: cannot merge into ScaledFloat8: its weight is torch.float8_e4m3fn"
        ):
            merge()
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_a_layer_without_features_is_refused(shape):
    with pytest.raises(ValueError, match="layer: a weight of .* cannot be adapted"):
        adapted(nn.Linear(*shape))


# What others hold stays what it is


def test_merging_keeps_the_very_parameter():
    model = adapted(nn.Linear(IN, OUT))
    weight = layer_of(model).base_layer.weight
    before, address = weight.detach().clone(), weight.data_ptr()
    for _ in range(3):
        model.merge_adapter()
        assert layer_of(model).base_layer.weight is weight and weight.data_ptr() == address
        assert not torch.equal(weight, before)
        model.unmerge_adapter()
        assert layer_of(model).base_layer.weight is weight and torch.equal(weight, before)


@pytest.mark.parametrize("data", [False, True], ids=["parameter", "storage"])
def test_a_tied_weight_is_left_to_its_partner(data):
    base = ReadsDtype()
    base.layer = nn.Linear(IN, IN)
    if data:
        base.layer.weight.data = base.before.weight.data
    else:
        base.layer.weight = base.before.weight
    model = get_peft_model(base, config(init_weights=False))
    partner = model.base_model.model.before.weight
    before = partner.detach().clone()
    model.merge_adapter()
    assert torch.equal(partner, before) and not torch.equal(layer_of(model).weight, before)
    model.unmerge_adapter()
    assert layer_of(model).weight.data_ptr() == partner.data_ptr()


def test_a_base_that_trains_along_goes_on_training_after_and_while_merged():
    model = adapted(nn.Linear(IN, OUT))
    weight = layer_of(model).base_layer.weight.requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    dW = layer_of(model).get_delta_weight("default")
    model.merge_adapter()
    before = weight.detach().clone()
    model(torch.randn(3, IN)).sum().backward()
    optimizer.step()
    moved = weight.detach() - before
    assert moved.any()
    after = weight.detach().clone()
    model.unmerge_adapter()
    torch.testing.assert_close(weight.detach(), after - dW)


def swap(weight):
    weight.data[[0, 1]] = weight.data[[1, 0]]


WRITES = {
    "add": lambda weight: weight.data.add_(0.5),
    "copy": lambda weight: weight.data.copy_(2 * weight.data),
    "replace": lambda weight: setattr(weight, "data", weight.data + 0.5),
    "one": lambda weight: weight.data.view(-1)[3:4].neg_(),
    "swap": swap,
    "step": lambda weight: weight.detach().mul_(1.5),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("leave", ["unmerge", "disable", "copy"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(IN, OUT), lambda: nn.Conv2d(4, OUT, 3)], ids=["linear", "conv"])
def test_any_write_to_a_merged_weight_is_kept(make, write, leave):
    model = adapted(make())
    dW = layer_of(model).get_delta_weight("default")
    model.merge_adapter()
    write(layer_of(model).base_layer.weight)
    expected = layer_of(model).base_layer.weight.detach() - dW
    model = copy.deepcopy(model) if leave == "copy" else model
    if leave == "disable":
        with model.disable_adapter(), torch.no_grad():
            model(torch.randn(2, IN) if dW.ndim == 2 else torch.randn(2, 4, 9, 9))
    else:
        model.unmerge_adapter()
    torch.testing.assert_close(layer_of(model).base_layer.weight.detach(), expected)


def test_a_merged_weight_that_is_written_to_and_cast_keeps_what_was_written():
    model = adapted(nn.Linear(IN, OUT))
    dW = layer_of(model).get_delta_weight("default")
    model.merge_adapter()
    layer_of(model).base_layer.weight.data.add_(0.5)
    expected = layer_of(model).base_layer.weight.detach().double() - dW
    model.double().unmerge_adapter()
    torch.testing.assert_close(layer_of(model).base_layer.weight.detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "change", [lambda m: m.bfloat16(), lambda m: m.double(), copy.deepcopy], ids=["16", "64", "copy"]
)
def test_a_merged_model_may_be_cast_and_copied(change):
    model = adapted(nn.Linear(IN, OUT))
    before = layer_of(model).weight.detach().clone()
    model.merge_adapter()
    model = change(model)
    dtype = layer_of(model).weight.dtype
    model.unmerge_adapter()
    assert layer_of(model).weight.dtype == dtype and torch.equal(layer_of(model).weight, before.to(dtype))


def test_a_base_weight_is_not_loaded_into_a_merged_layer():
    model = adapted(nn.Linear(IN, OUT))
    state = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="holds merged adapters; call unmerge_adapter"):
        model.load_state_dict(state)
    model.unmerge_adapter()
    model.load_state_dict(state)


def test_f_stays_exact_through_casts():
    model = adapted(nn.Linear(IN, OUT), f=1 / 3)
    f = factors_of(model).update_scale.clone()
    model.half().bfloat16().float()
    assert torch.equal(factors_of(model).update_scale, f)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.B.data.mul_(2),  # as averages of weights are swapped in
        lambda f: f.half().float(),
        lambda f: [setattr(f.B, "data", f.B.data * 2), setattr(f.B, "data", f.B.data * 3)],
    ],
    ids=["data in place", "there and back", "replaced twice"],
)
def test_evaluation_sees_writes_that_leave_no_trace(change):
    model, x = adapted(nn.Linear(IN, OUT)).eval(), torch.randn(3, IN)
    with torch.no_grad():
        model(x)
        change(factors_of(model))
        kept = model(x)
    expected = F.linear(x, layer_of(model).weight, layer_of(model).bias) + F.linear(x, dW_of(model))
    torch.testing.assert_close(kept, expected)


def test_print_shows_the_adapter():
    model = adapted(nn.Linear(IN, OUT), f=0.25)
    assert "r1=2, r2=4, A=2x10, B=12x2, C=4x10, D=12x4, scale=2.475, f=0.25, kernel=auto" in repr(model)
    with torch.device("meta"):
        assert "f=?" in repr(get_peft_model(Net(nn.Linear(IN, OUT)), config()))


def test_one_layer_that_cannot_merge_leaves_the_others_alone():
    base = Both()
    nn.utils.parametrizations.weight_norm(base.layer)
    model = get_peft_model(base, config(target_modules=["before", "layer"]))
    set_update_scale(model, 1.0)
    first = model.base_model.model.before
    before = first.weight.detach().clone()
    with pytest.raises(ValueError, match="layer: cannot merge"):
        model.merge_adapter()
    assert torch.equal(first.weight, before) and not first.merged


def test_one_layer_of_a_quantization_that_peft_only_reads_leaves_the_others_alone():
    model = get_peft_model(Both(), config(target_modules=["before", "layer"]))
    first = model.base_model.model.before
    layer_of(model).quantization_backend = SimpleNamespace(supports_merge=False, backend_name="gptq")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="layer: cannot merge into Linear: PEFT .* cannot write a weight in gptq"):
            merge()
    assert not first.merged


def umt5():
    """Scales its logits by d_model**-0.5 while `config.tie_word_embeddings` is set."""
    return UMT5ForConditionalGeneration(
        UMT5Config(vocab_size=99, d_model=32, d_ff=37, d_kv=8, num_layers=1, num_heads=4, decoder_start_token_id=0)
    )


def test_untying_a_model_that_scales_its_logits_while_tied_is_refused():
    base, inputs = umt5(), {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    if not base.config.tie_word_embeddings:
        pytest.skip("UMT5 of this release of transformers is not tied")
    model = get_peft_model(base, config(target_modules=["lm_head", "q"], init_weights=False)).eval()
    expected = output(model, inputs)
    for _ in range(2):  # nothing is merged yet; then it is
        with pytest.raises(ValueError, match="untie the embeddings, but UMT5ForConditionalGeneration scales"):
            model.merge_and_unload()
        model.merge_adapter()
        torch.testing.assert_close(output(model, inputs), expected)
    model.unmerge_adapter()
    model.add_adapter("q", config(target_modules=["q"], init_weights=False))
    model.set_adapter("q")
    expected = output(model, inputs)
    torch.testing.assert_close(output(model.merge_and_unload(), inputs), expected)


def bert():
    """Ties the bias of its head, too; drawn here, since the initial zeros would be right if it got lost."""
    fields = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 37}
    model = BertForMaskedLM(BertConfig(**fields, num_hidden_layers=1, num_attention_heads=4))
    nn.init.normal_(model.cls.predictions.bias)
    return model


BART = {
    "vocab_size": 99, "max_position_embeddings": 32, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
}  # fmt: skip


def bart():
    """Ties the tables of encoder and decoder, too."""
    return BartForConditionalGeneration(BartConfig(**BART))


def florence2():
    """Ties its output layer; the BART within ties its own tables."""
    vision = {"embed_dim": (8,), "depths": (1,), "num_heads": (1,), "num_groups": (1,), "patch_size": (3,)}
    patches = {"patch_stride": (4,), "patch_padding": (1,), "patch_prenorm": (False,), "projection_dim": 32}
    return Florence2ForConditionalGeneration(Florence2Config(text_config=BART, vision_config=vision | patches))


@pytest.mark.parametrize(
    "make, target, lost",
    [
        (bert, "cls.predictions.decoder", "cls.predictions.bias and cls.predictions.decoder.bias"),
        (bert, "word_embeddings", "cls.predictions.bias and cls.predictions.decoder.bias"),
        (bart, "lm_head", "model.shared.weight and model.encoder.embed_tokens.weight and .*"),
    ],
)
def test_untying_a_model_that_ties_more_than_its_embeddings_is_refused(make, target, lost):
    inputs = {"input_ids": IDS}
    model = get_peft_model(make(), config(target_modules=[target], init_weights=False)).eval()
    expected = output(model, inputs)
    with pytest.raises(ValueError, match=f"{target}: merge_and_unload would untie .* ties {lost}, of which a saved"):
        model.merge_and_unload()
    model.merge_adapter()
    torch.testing.assert_close(output(model, inputs), expected)


@pytest.mark.parametrize(
    "make, targets",
    [
        (bert, ["query"]),
        (bart, ["q_proj"]),
        (bart, ["encoder.embed_tokens"]),
        (bart, ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
        (t5, ["lm_head"]),
        (florence2, ["lm_head"]),
    ],
)
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
def test_a_merged_model_with_other_ties_is_saved_exactly(make, targets, tmp_path):
    model = get_peft_model(make(), config(target_modules=targets, init_weights=False)).eval()
    inputs = {"input_ids": IDS} | ({} if make is bert else {"decoder_input_ids": IDS[:, :4]})
    expected = output(model, inputs)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(output(type(merged).from_pretrained(tmp_path).eval(), inputs), expected)
