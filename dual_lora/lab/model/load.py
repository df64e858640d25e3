"""Base models, from a folder, a GGUF file or the hub: no pickle, no code from the model's repository."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig

import dual_lora.tuner  # noqa: F401  registers the method with PEFT, before any adapter is read
from dual_lora.lab.config.outside.models import ALL_LINEAR, RESAVE_REMEDY
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import require
from dual_lora.lab.inputs.gguf import SAVED_MODEL_REMEDY, read_gguf_header
from dual_lora.lab.inputs.model_config import AFTER_PADDING
from dual_lora.lab.inputs.model_files import (
    check_model_folder,
    link_model,
    list_tensors,
    list_weight_files,
    translate_model_errors,
)
from dual_lora.lab.model.fused_layers import split_layers
from dual_lora.lab.model.nf4 import copy_dequantized_weights, get_quantization_options, keep_as_loaded, list_4bit_layers
from dual_lora.lab.model.source import (
    NO_CODE,
    find_gguf_file,
    find_head_dropout_field,
    find_links,
    get_head_options,
    is_dropout,
    list_dropouts,
    load_config,
    locate_model,
    name_model,
)
from dual_lora.lab.model.tokenizer import load_tokenizer
from dual_lora.lab.system.distributed import count_processes, has_several_processes, print_warning
from dual_lora.lab.system.libraries import allows_tf32
from tasks import Task

CONFIG_REMEDY = "use the config.json that belongs to the weights"
# Relative difference that rounding can make in a model's logits: in float32, and in 16 bits or TF32.
ROUNDING, COARSE_ROUNDING = 1e-4, 5e-2
# Names of tensors next to a weight that quantized weights and adapters consist of.
QUANTIZED_PART = re.compile(
    r"\.(lora_\w+|base_layer|original_module|modules_to_save|qweight|qzeros|scales|g_idx|SCB|weight_format|absmax|"
    r"weight_(scale\w*|packed|zero_point|shape)|weight\.(absmax|quant_map|quant_state|nested_\w+))(\.|$)"
)


@dataclass(frozen=True)
class RandomState:
    """The state of torch's random numbers, on the CPU and on every GPU."""

    cpu: torch.Tensor
    gpus: list[torch.Tensor]

    @classmethod
    def save(cls) -> "RandomState":
        """Return the present state."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])

    def restore(self) -> None:
        """Make torch draw the numbers that follow this state."""
        torch.set_rng_state(self.cpu)
        if self.gpus:
            torch.cuda.set_rng_state_all(self.gpus)


def load_model(settings: Settings, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the base model with the head that the task's form needs, and its tokenizer. GGUF weights are dequantized.
    A head is always freshly initialized, even if the weights contain one: otherwise two copies of a model would start
    differently.

    Raises:
        UserError: the model is neither at `model.path` nor on the hub, or what is there is refused, or its head has no
            dropout of its own to set.
    """
    settings.hardware.check_installed()
    tokenizer = load_tokenizer(settings)
    config = load_config(settings, task)
    set_own_padding(config, tokenizer, settings)
    options = {"config": config, "dtype": get_weight_dtype(settings), "use_safetensors": True}
    options |= get_quantization_options(settings) | get_decoding_default(task)
    file = find_gguf_file(settings)
    if file:
        options["quantization_config"] = GgufConfig(dequantize=True)
    draws = RandomState.save()
    with translate_model_errors(settings):
        options |= get_shard_options(settings, task)
        # Only a head may have another size: `check_loaded_weights` refuses any other mismatch.
        options["ignore_mismatched_sizes"] = has_stored_head(settings)
        model, found = get_head_class(task).from_pretrained(
            **locate_model(settings, weights=True), **options, output_loading_info=True
        )
    keep_as_loaded(model)
    if task.form != "generation":
        check_head_modules(model, settings)
    check_loaded_weights(model, found, tokenizer, settings)
    check_dropout(model, settings)
    if task.form != "generation":
        check_head_dropout(model, settings)
        draw_head(model, found["missing_keys"], draws, settings)
    split_layers(model, settings)
    cast_heads_to_float32(model, settings, task)
    model.name_or_path = model.config.name_or_path = name_model(settings)
    set_token_ids(model, tokenizer)
    return model, tokenizer


def has_stored_head(settings: Settings) -> bool:
    """Return whether a model's weights hold a head."""
    return any(name.split(".")[0] in settings.model.heads for name in list_held_tensors(settings))


def list_held_tensors(settings: Settings) -> list[str]:
    """Return the names of the tensors in a model's weights; none of a GGUF file.

    Raises:
        UserError: the weights cannot be fetched, or are damaged.
    """
    if find_gguf_file(settings):
        return []
    return [name for file in list_weight_files(find_links(settings, weights=True)) for name in list_tensors(file)]


def set_own_padding(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
    """Set the tokenizer's padding id in a configuration before the model is built. If padding is also the end of text,
    it is not set: the embedding of that token would not train.

    Raises:
        UserError: the positions of this kind of model start after the padding id, and the weights have another one.
    """
    padding, own = tokenizer.pad_token_id, getattr(config, "pad_token_id", None)
    if padding == tokenizer.eos_token_id or padding >= config.get_text_config().vocab_size:
        return
    require(
        padding == own or config.model_type not in AFTER_PADDING,
        f"model={settings.model.name}: its tokenizer pads with {padding} ({tokenizer.pad_token!r}), but its "
        f"config.json says pad_token_id={own}, after which the positions of a {config.model_type} start; make "
        "pad_token of tokenizer_config.json that token",
    )
    config.pad_token_id = padding


def get_decoding_default(task: Task) -> dict[str, GenerationConfig]:
    """Return the option that stops `from_pretrained` from reading decoding settings next to the weights."""
    return {"generation_config": GenerationConfig()} if task.form == "generation" else {}


def check_head_modules(model: PreTrainedModel, settings: Settings) -> None:
    """Refuse a model with a part outside of the base model that `model.head` does not name, whether or not the weights
    hold it: it would be kept as it is, frozen, or be adapted as a layer of the base model.

    Raises:
        UserError: with the modules to name.
    """
    outer = dict.fromkeys(name.split(".")[0] for name, _ in model.named_parameters())
    unnamed = [name for name in outer if name not in {model.base_model_prefix, *settings.model.heads}]
    require(
        not unnamed,
        f"model={settings.model.name}: the head of a {model.config.model_type} has {', '.join(unnamed)}, too, which "
        f"must be drawn anew and train in full; take model.head=[{','.join([*settings.model.head, *unnamed])}]",
    )


def check_dropout(model: PreTrainedModel, settings: Settings) -> None:
    """Refuse a `model.dropout` that nothing in the base model reads: some kinds have fields without effect.

    Raises:
        UserError: with the kind of model.
    """
    chosen = settings.model.dropout
    require(
        chosen is None or chosen in find_held_dropouts(model.base_model),
        f"model.dropout={chosen}: a {model.config.model_type} does not read its dropouts ("
        f"{', '.join(filter(is_dropout, list_dropouts(model.config)))}); drop it",
    )


def find_held_dropouts(model: torch.nn.Module) -> set[float]:
    """Return the values of the dropouts that the modules of a model hold, as modules or as numbers."""
    modules = list(model.modules())
    numbers = {v for m in modules for name, v in vars(m).items() if "drop" in name and type(v) in (int, float)}
    return numbers | {m.p for m in modules if isinstance(m, torch.nn.modules.dropout._DropoutNd)}


def list_held_dropouts(model: torch.nn.Module) -> dict[str, float]:
    """Return the dropouts of a model's configuration without those whose value nothing in the model holds."""
    held = find_held_dropouts(model)
    return {name: value for name, value in list_dropouts(model.config).items() if value in held}


def check_head_dropout(model: PreTrainedModel, settings: Settings) -> None:
    """Refuse a `task.head_dropout` that the head does not have. Print a warning where the head takes `model.dropout`.

    Raises:
        UserError: there is no dropout before the head, or it is the base model's.
    """
    model_type, chosen, base = model.config.model_type, settings.task.head_dropout, set(model.base_model.modules())
    found = [part.p for part in model.modules() if isinstance(part, torch.nn.Dropout) and part not in base]
    where, follows = f"task.head_dropout={chosen}", f"the head of a {model_type} has the dropout of the base model"
    require(chosen is None or found, f"{where}: a {model_type} has no dropout before its head; drop it")
    require(chosen is None or chosen in found, f"{where}: {follows}; drop it, or take model.dropout={chosen} for both")
    shared = found and settings.model.dropout is not None and not find_head_dropout_field(model.config)
    if shared:
        print_warning(f"model.dropout={settings.model.dropout}: {follows}")


def draw_head(model: PreTrainedModel, missing: set[str], draws: RandomState, settings: Settings) -> None:
    """Reinitialize a head that came with the weights, with the random numbers it would have got without them."""
    heads = {name: module for name, module in model.named_children() if name in settings.model.heads}
    if not any(f"{name}.{part}" not in missing for name, head in heads.items() for part, _ in head.named_parameters()):
        return
    draws.restore()
    for head in heads.values():
        for weight in head.parameters():
            weight._is_hf_initialized = False
        head.apply(model._init_weights)


def load_tuned_model(
    folder: Path, settings: Settings, task: Task, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Return the model that a run of method=full left in its record, read as a base model is.

    Raises:
        UserError: the folder holds no model, or what lies there cannot be honoured.
    """
    check_model_folder(folder)
    place = {"pretrained_model_name_or_path": str(link_model(folder)), **NO_CODE}
    config = AutoConfig.from_pretrained(**place)
    config.update(get_head_options(task))
    # As in the base model: the saved one may be the tokenizer's end of text.
    config.pad_token_id = getattr(load_config(settings, task), "pad_token_id", None)
    set_own_padding(config, tokenizer, settings)
    options = {"dtype": get_weight_dtype(settings), "use_safetensors": True}
    model = get_head_class(task).from_pretrained(config=config, **place, **options, **get_decoding_default(task))
    model.name_or_path = model.config.name_or_path = str(folder)
    set_token_ids(model, tokenizer)
    return model


def check_loaded_weights(
    model: PreTrainedModel, found: dict[str, Any], tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> None:
    """Refuse weights that are not the model's, or a tokenizer that is not. found: transformers' report of loading.

    Raises:
        UserError: with what does not fit.
    """
    fresh, where = settings.model.heads, f"model={settings.model.name}"
    missing = sorted(name for name in found["missing_keys"] if not fresh & set(name.split(".")))
    other = sorted(name for name, *_ in found["mismatched_keys"] if not fresh & set(name.split(".")))
    require(
        not other,
        f"{where}: the shapes of its weights differ from its config.json, first {other[:1]}; they are another model's",
    )
    # Many encoders have a pooler in the base model, without which masked language models are saved.
    pooler = missing and all("pooler" in name.split(".") for name in missing)
    remedy = f", or were saved without it: then take model.head=[{','.join(['pooler', *settings.model.head])}]"
    require(
        not missing,
        f"{where}: its weights are missing {len(missing)} tensors that its config.json asks for, first {missing[:1]}; "
        f"they are another model's{remedy if pooler else ''}",
    )
    check_left_out_weights(model, found["unexpected_keys"], settings)
    if file := find_gguf_file(settings):
        check_all_weights_read(model, file)
    known, asked = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values(), default=0)
    require(asked < known, f"{where}: its tokenizer goes to {asked}, the model knows {known} tokens")


def check_left_out_weights(model: PreTrainedModel, left_out: set[str], settings: Settings) -> None:
    """Refuse weights of which a part that belongs to the model would not be loaded: further layers, what quantized
    weights or adapters consist of, or one parameter under two names. Parts that the model has no place for, such as
    another head, are left out.

    Raises:
        UserError: with the first such tensor.
    """
    where = f"model={settings.model.name}: its weights"
    heads = settings.model.heads
    known = {re.sub(r"\d+", "N", name) for name in model.state_dict()}
    layers = sorted(n for n in left_out if re.sub(r"\d+", "N", n) in known and not heads & set(n.split(".")))
    require(not layers, f"{where} hold layers that its config.json leaves out, first {layers[:1]}; {CONFIG_REMEDY}")
    parts = sorted(name for name in left_out if QUANTIZED_PART.search(name))
    require(
        not parts,
        f"{where} hold {parts[:1]}, a part of quantized weights or of an adapter, which would be left out; take the "
        "plain model, with the adapter merged",
    )
    twice = find_duplicate_tensor(list_held_tensors(settings), model.base_model_prefix)
    require(twice is None, f"{where} hold one parameter under two names, first {twice!r}; {RESAVE_REMEDY}")


def find_duplicate_tensor(names: list[str], prefix: str) -> str | None:
    """Return a name of a tensor that transformers would load into the same parameter as another one: it adds or drops
    the prefix of the base model, and renames the gamma and beta of old layer norms. None if there is none."""
    seen: set[str] = set()
    for name in names:
        plain = name.removeprefix(f"{prefix}.").replace("LayerNorm.gamma", "LayerNorm.weight")
        plain = plain.replace("LayerNorm.beta", "LayerNorm.bias")
        if plain in seen:
            return name
        seen.add(plain)
    return None


def set_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a model's configurations the special tokens of its tokenizer."""
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in configs.values():
            setattr(config, name, getattr(tokenizer, name))
        if model.can_generate():
            setattr(model.generation_config, name, getattr(tokenizer, name))


def get_weight_dtype(settings: Settings) -> torch.dtype:
    """Return the dtype of the model's weights: `model.dtype`, but float32 if all of them train. In 16 bits a typical
    update is smaller than the spacing of numbers, and AdamW's running means would not decay. Products are still
    computed in `model.dtype` (`autocast_products`)."""
    return torch.float32 if settings.method.peft is None else getattr(torch, settings.model.dtype)


def cast_heads_to_float32(model: PreTrainedModel, settings: Settings, task: Task) -> None:
    """Cast a task's heads to float32."""
    heads = settings.model.heads if task.form != "generation" else set()
    for name, weight in model.named_parameters():
        if heads & set(name.split(".")):
            cast_to_float32(weight)


def cast_trained_to_float32(model: torch.nn.Module) -> None:
    """Cast to float32 what trains in 16 bits once a method is attached: modules of the base model that it names, biases
    and norms. Adapters are in float32 already, and PEFT casts their inputs. It does not for these, so the model needs
    `autocast_products` from here on."""
    model.mixes_dtypes = False
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if any(weight.requires_grad and weight.dtype.itemsize < 4 for weight in own):
            model.mixes_dtypes = True
            for weight in own:
                if weight.requires_grad or weight.ndim == 1:  # a norm takes its weight and its bias in one dtype only
                    cast_to_float32(weight)


def cast_to_float32(weight: torch.nn.Parameter) -> None:
    """Cast a weight in place, so that it stays tied to what it is tied to, unless it has four bytes or more."""
    if weight.dtype.itemsize < 4:
        weight.data = weight.data.float()


def autocast_products(model: torch.nn.Module, settings: Settings, form: str) -> AbstractContextManager[None]:
    """Return a context that computes products in `model.dtype`, as the Trainer does in training. It is active only if
    the model mixes dtypes: it has a head, was trained in full, or trains weights of the base along with an adapter."""
    dtype = getattr(torch, settings.model.dtype)
    mixed = form != "generation" or settings.method.peft is None or getattr(model, "mixes_dtypes", False)
    return torch.autocast(model.device.type, dtype, enabled=mixed and dtype.itemsize < 4)


def agree_up_to_rounding(found: torch.Tensor, expected: torch.Tensor, model: torch.nn.Module) -> bool:
    """Return whether a model's logits differ from expected ones by no more than rounding can make. Expected logits that
    are not all finite decide nothing, which counts as yes."""
    exact = min(model.dtype.itemsize, expected.dtype.itemsize) >= 4 and not allows_tf32()
    found, expected = found.float(), expected.float()
    near = (found - expected).norm() <= (ROUNDING if exact else COARSE_ROUNDING) * expected.norm()
    return bool(near) or not bool(expected.isfinite().all())


def explain_unshardable(settings: Settings, task: Task, model_class: type) -> str | None:
    """Return why FSDP2 cannot shard a model of this class for this task and method; None if it can."""
    if task.form != "generation":
        return f"not for {task.name}, whose head trains"
    if not getattr(model_class, "_fsdp_plan", None):
        return f"transformers cannot shard a {model_class.config_class.model_type}"
    if settings.method.peft is None and settings.model.dtype == "float16":
        return "transformers shards full tuning in bfloat16 or float32"
    if (settings.method.peft or {}).get("use_dora"):
        return f"method={settings.method.name} starts from the base weights, which are sharded"
    return None


def get_shard_options(settings: Settings, task: Task) -> dict[str, DistributedConfig]:
    """Return how the processes of a run load the weights: each a shard of every weight (FSDP2), or each everything.

    Raises:
        UserError: the model cannot be sharded for this task and method.
    """
    if settings.hardware.sharding != "full" or not has_several_processes():
        return {}
    config = load_config(settings, task)
    why = explain_unshardable(settings, task, get_head_class(task)._model_mapping[type(config)])
    require(why is None, f"hardware.sharding=full: {why}; take hardware=ddp")
    mixed = settings.model.dtype == "bfloat16" and settings.method.peft is None
    return {"distributed_config": DistributedConfig(fsdp_size=count_processes(), fsdp_mixed_precision=mixed)}


def is_sharded(model: torch.nn.Module) -> bool:
    """Return whether this process holds only a shard of each weight."""
    return getattr(model, "is_distributed_loading_by_transformers", False)


@contextmanager
def switch_mode(model: torch.nn.Module, training: bool) -> Iterator[None]:
    """A context in which the model is in training or in evaluation mode; after it, however it ends, in its own again.
    A sharded model frees the weights that it gathered: training must gather them again, with gradients."""
    own = model.training
    model.train(training)
    try:
        yield
    finally:
        for module in model.modules() if is_sharded(model) else ():
            if isinstance(module, FSDPModule):
                module.reshard()
        model.train(own)


def check_all_weights_read(model: PreTrainedModel, file: Path) -> None:
    """Refuse a GGUF file with more weights than the model that transformers built from it takes. Experts are not
    counted, because transformers joins them.

    Raises:
        UserError: the file holds weights that the model does not take.
    """
    held = sum("_exps" not in name for name in read_gguf_header(file).tensors)
    taken = len(list(model.parameters()))
    class_name = type(model).__name__
    require(held <= taken, f"model.path={file}: holds {held} weights, {class_name} takes {taken}; {SAVED_MODEL_REMEDY}")


def load_dequantized_model(settings: Settings, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return what `load_model` does, but a base in 4 bits as a plain model with the dequantized values, in float32.

    Raises:
        UserError: as `load_model`.
    """
    model, tokenizer = load_model(settings, task)
    if settings.hardware.base is None:
        return model, tokenizer
    plain, _ = load_model(replace(settings, hardware=replace(settings.hardware, base=None)), task)
    copy_dequantized_weights(model, plain.float())
    return plain, tokenizer


def move_to_device(model: torch.nn.Module) -> None:
    """Move a model to the accelerator, if there is one, as the Trainer does for training. A model in 4 bits or
    in shards was loaded there."""
    if torch.cuda.is_available() and not list_4bit_layers(model) and not is_sharded(model):
        model.to("cuda")


def get_head_class(task: Task) -> type:
    """Return the class of transformers that puts the head of the task's form on a model."""
    return AutoModelForCausalLM if task.form == "generation" else AutoModelForSequenceClassification


def build_target_pattern(settings: Settings) -> str:
    """Return the regular expression of the module names that `model.adapt` chooses, for PEFT's `target_modules`, or
    PEFT's word for all linear layers but the head."""
    chosen = {settings.roles[role] for role in settings.model.adapt}
    if ALL_LINEAR in chosen:
        return ALL_LINEAR
    return build_module_pattern(sorted(chosen))


def build_module_pattern(ends: list[str]) -> str:
    """Return the regular expression of the full names of modules, from those for the ends of their names."""
    return rf"(?:.*\.)?(?:{'|'.join(ends)})"


def unwrap_adapter(model: torch.nn.Module) -> PreTrainedModel:
    """Return the model without PEFT's wrapper, its adapters in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
