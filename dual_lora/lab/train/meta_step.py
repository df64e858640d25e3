"""One training step on torch's meta device, where tensors have shapes but no values."""

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.pytorch_utils import Conv1D

from dual_lora.analysis.memory import measure_kept_bytes
from dual_lora.lab.config.recorded import replace_settings
from dual_lora.lab.config.schema import MAX_LAYERS, Settings
from dual_lora.lab.errors import UserError, require, translate_read_errors
from dual_lora.lab.inputs.model_files import find_model
from dual_lora.lab.model.adapt import attach_method, translate_method_errors
from dual_lora.lab.model.encode import get_position_limit
from dual_lora.lab.model.fused_layers import split_layers
from dual_lora.lab.model.load import (
    cast_heads_to_float32,
    check_dropout,
    check_head_modules,
    get_head_class,
    get_weight_dtype,
    unwrap_adapter,
)
from dual_lora.lab.model.nf4 import list_quantizable_layers
from dual_lora.lab.model.source import get_head_options, load_config, set_dropout
from dual_lora.lab.train.activations import apply_gradient_checkpointing
from tasks import Task

# What PEFT's configurations call the choice of initial weights; False keeps torch's default initialization.
INITIALIZERS = ("init_lora_weights", "init_weights", "init_ia3_weights")
PAD_TOKEN = 0  # any id will do: it does not affect shapes


def build_meta_model(settings: Settings, task: Task, layers: int | None = None) -> PreTrainedModel:
    """Return the base model on the meta device, with all its layers, or the first `layers`.

    Raises:
        UserError: neither the model's YAML nor a folder nor the hub gives its architecture, or it makes no model.
    """
    values = settings.model.architecture
    path = find_model(settings)
    require(
        path or values or settings.model.hub,
        f"model={settings.model.name}: no architecture in its YAML; give model.path=DIR or architecture there",
    )
    options = get_head_options(task)
    if task.form != "generation":
        options["pad_token_id"] = PAD_TOKEN  # else a causal model with a head takes one example at a time only
    with translate_read_errors(f"model={settings.model.name}: its architecture makes no model", "give model.path=DIR"):
        config = AutoConfig.for_model(**values) if values and not path else load_config(settings, task)
        config.update(options)
        set_dropout(config, settings)
    check_layers(settings, config)
    if layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    if get_head_class(task)._model_mapping[type(config)]._supports_sdpa:
        config._attn_implementation = "planned"
    with torch.device("meta"):
        model = get_head_class(task).from_config(config, dtype=get_weight_dtype(settings))
        split_layers(model, settings)
    if task.form != "generation":
        check_head_modules(model, settings)
    if not layers:  # the first ones alone may have none
        check_dropout(model, settings)
    cast_heads_to_float32(model, settings, task)
    return model


def check_layers(settings: Settings, config: PreTrainedConfig) -> None:
    """Refuse a number of layers that no model has: all of them are built to be counted.

    Raises:
        UserError: with that number.
    """
    layers = getattr(config, "num_hidden_layers", None)
    fine = isinstance(layers, int) and 0 < layers <= MAX_LAYERS
    require(fine, f"model={settings.model.name}: num_hidden_layers is {layers}; a plan needs 1 to {MAX_LAYERS:,}")


def attach_to_meta_model(settings: Settings, task: Task, layers: int | None = None) -> torch.nn.Module:
    """Return the model on the meta device with the method attached. Some initializers decompose the base weights
    (PiSSA, OLoRA) or read data, neither of which exists there. Such a method gets torch's default initial weights
    instead; their number is the same.

    Raises:
        UserError: the method refuses its settings, or the model's architecture is not known.
    """
    model = build_meta_model(settings, task, layers)  # whose errors are no method's
    with suppress(UserError), torch.device("meta"):  # else the method draws its weights before they are moved there
        return attach_method(model, settings, task.form)
    try:
        return attach_method(build_meta_model(settings, task, layers), settings, task.form)
    except UserError:
        plain = skip_initialization(settings)
        if plain == settings:
            raise
    try:
        return attach_method(build_meta_model(settings, task, layers), plain, task.form)
    except UserError as error:
        reads = re.search("meta (tensor|device)", str(error))
        name = settings.method.name
        require(not reads, f"plan: method={name} looks at the base weights, which a plan does not load; run it instead")
        raise


def skip_initialization(settings: Settings) -> Settings:
    """Return the settings with a method that draws no initial weights."""
    own = settings.method.peft
    if own is None:
        return settings
    config_type = PEFT_TYPE_TO_CONFIG_MAPPING.get(own.get("peft_type"))
    named = [field.name for field in fields(config_type)] if config_type else []
    drawn = {name: False for name in named if name in INITIALIZERS}
    return replace(settings, method=replace(settings.method, peft={**own, **drawn}))


def compute_flash_attention(
    module, query: Tensor, key: Tensor, value: Tensor, mask, scaling=None, **_
) -> tuple[Tensor, None]:
    """Flash attention, which accelerators use and which stores no attention scores for backward; on the meta device
    torch would pick the variant that stores them all.

    query: batch x heads x tokens x size; key, value: the same with key-value heads. Returns batch x tokens x heads x
    size, and None for the attention weights."""
    dtype = next(module.parameters()).dtype  # positions and a cache may have made them float32; autocast undoes that
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    causal = getattr(module, "is_causal", True)
    found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scaling)[0]
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register("planned", compute_flash_attention)
AttentionMaskInterface.register("planned", lambda *args, **kwargs: None)


def trace_step(settings: Settings, task: Task, layers: int, sharded: bool) -> dict[str, int]:
    """Return the cost of a step on one batch: tokens, operations forward and backward, bytes kept for backward.

    Each is measured with one and with two layers and extrapolated linearly, since all layers are alike. With gradient
    checkpointing the bytes include what the layer that backward is running again keeps beyond its input.
    """
    one, two = (take_meta_step(settings, task, count, sharded) for count in (1, 2))
    found = {name: one[name] + (layers - 1) * (two[name] - one[name]) for name in one}
    if settings.train.gradient_checkpointing:
        plain = replace_settings(settings, {"train.gradient_checkpointing": None})
        inputs = two["kept"] - one["kept"]
        one, two = (take_meta_step(plain, task, count, sharded) for count in (1, 2))
        found["kept"] += two["kept"] - one["kept"] - inputs
    return found


def take_meta_step(settings: Settings, task: Task, layers: int, sharded: bool) -> dict[str, int]:
    """Take one step on the meta device with so many layers."""
    model = attach_to_meta_model(settings, task, layers).train()
    apply_gradient_checkpointing(model, settings)
    if sharded or settings.method.peft is not None:
        model.to(getattr(torch, settings.model.dtype))  # the dtype it computes in, except for a head
    else:
        imitate_autocast(model, getattr(torch, settings.model.dtype))
    for layer in list_quantizable_layers(model, settings.model) if settings.hardware.base else ():
        layer.register_forward_hook(lambda *_: None)  # so that no adapter computes its product and the layer's in one
    limit = get_position_limit(unwrap_adapter(model)) or settings.task.max_length
    ids = torch.zeros(settings.train.batch_size, min(settings.task.max_length, limit), dtype=torch.long, device="meta")
    labels = {"generation": ids, "classification": ids[:, 0], "regression": ids[:, 0].float()}[task.form]
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)

    # transformers' own mask for eager attention depends on the mask's values, which the meta device does not have;
    # without one the same is computed.
    base = unwrap_adapter(model)
    eager = base.config._attn_implementation == "eager"
    reads_mask = eager and hasattr(sys.modules[type(base).__module__], "create_bidirectional_mask")
    mask = None if reads_mask else torch.ones_like(ids)

    def step() -> Callable[[], None]:
        with forward:
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss

        def back() -> None:
            with backward:
                if loss.requires_grad:  # not where the model is scored as it is
                    loss.backward()

        return back

    with translate_method_errors(settings):
        kept = measure_kept_bytes(model, step)
    found = {"forward": forward.get_total_flops(), "backward": backward.get_total_flops()}
    return {"tokens": ids.numel(), "kept": kept, **found}


def imitate_autocast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Have a model in float32 compute as under autocast, which the meta device does not know: linear layers in `dtype`,
    all else in float32."""
    for layer in model.modules():
        if type(layer) in (torch.nn.Linear, Conv1D):
            for name, weight in list(layer.named_parameters()):
                setattr(layer, name, torch.nn.Parameter(weight.to(dtype)))  # a new one: some are embeddings, too
            layer.register_forward_pre_hook(lambda _, inputs: tuple(x.to(dtype) for x in inputs))
