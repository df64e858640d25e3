"""What a model's config.json decides: the architecture of its weights, and nothing that a run's settings decide.

Transformers applies every field of that file. Here, fields that describe the architecture are kept. Fields that say how
the model is used are dropped, and the run's settings or the library's defaults apply instead. Fields that would turn
the weights into a model that the run cannot use are refused.
"""

import re
from typing import Any

from dual_lora.lab.errors import require

# Fields that say how a model is used, which a task, a method or the settings of a run decide.
HEAD_FIELDS = {"id2label", "label2id", "num_labels", "_num_labels", "problem_type", "finetuning_task", "loss_type"}
TOKEN_FIELDS = {"bos_token_id", "eos_token_id", "pad_token_id"}  # the tokenizer knows them
# Kinds of models whose positions start after the padding id that their weights were trained with.
AFTER_PADDING = {
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod", "camembert", "longformer",
    "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "luke", "markuplm", "xglm",
}  # fmt: skip
PRECISION_FIELDS = {"dtype", "torch_dtype", "use_bfloat16"}
KERNEL_FIELDS = {
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "use_kernels",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal", "chunk_size_feed_forward",
    "gradient_checkpointing", "torchscript", "use_cache", "pretraining_tp", "fusion_config", "distributed_config",
    "device_map", "tp_plan", "compile_config",
}  # fmt: skip
OUTPUT_FIELDS = {
    "return_dict", "use_return_dict", "output_attentions", "output_hidden_states", "output_router_logits",
    "_output_attentions", "output_scores", "return_dict_in_generate", "tie_last_hidden_states",
}  # fmt: skip
PLACE_FIELDS = {
    "name_or_path", "_name_or_path", "_commit_hash", "configuration_files", "task_specific_params", "generation_config",
}  # fmt: skip
DROPPED_FIELDS = HEAD_FIELDS | TOKEN_FIELDS | PRECISION_FIELDS | KERNEL_FIELDS | OUTPUT_FIELDS | PLACE_FIELDS
# Fields that are refused if they hold anything, with the remedy.
REFUSED_FIELDS = {
    "quantization_config": "its weights are quantized; take the plain model, with hardware=qlora for 4 bits",
    "compression_config": "its weights are compressed; take the plain model, with hardware=qlora for 4 bits",
    "transformers_weights": "it names another file of weights; name that file model.safetensors and drop the field",
    "pruned_heads": "its attention heads are pruned; take a model without",
}
# Fields that must match the defaults of the model's class: they would turn an encoder into a decoder, or back.
CLASS_FIELDS = ("is_decoder", "is_encoder_decoder", "add_cross_attention")
# Fields that transformers takes for the text part of a model, of whatever kind it is.
TEXT_PARTS = ("text_config", "text_encoder", "decoder", "generator")
# Fields of some architectures that the library's caches read of every model. Where a model's class does not have them,
# its layers ignore them, and so must decoding.
LAYER_FIELDS = ("layer_types", "sliding_window", "attention_chunk_size", "kv_sharing_modes")
COUNTED = re.compile(r"^(?!max_)(.*_)?(layers?|blocks|experts|heads)$")  # a module each
MAX_COUNT = 10_000


def clean_config(values: dict[str, Any], where: str, tensors: int | None = None) -> dict[str, Any]:
    """Return the fields of a config.json that decide what the model is.

    where: how messages name the file. tensors: how many tensors the weights hold, if that is known.

    Raises:
        UserError: a field cannot be honoured.
    """
    for name, remedy in REFUSED_FIELDS.items():
        require(not values.get(name), f"{where}: {name}: {remedy}")
    for name, value in values.items():
        check_count(name, value, where, tensors)
    dropped = DROPPED_FIELDS - ({"pad_token_id"} if values.get("model_type") in AFTER_PADDING else set())
    kept = {name: value for name, value in values.items() if name not in dropped}
    return {name: clean_part(name, value, where, tensors) for name, value in kept.items()}


def clean_part(name: str, value: Any, where: str, tensors: int | None) -> Any:
    """Return a field as it is, or cleaned if it is the configuration of a part, such as text_config."""
    part = isinstance(value, dict) and name.endswith("_config")
    return clean_config(value, f"{where}: {name}", tensors) if part else value


def fit_class_fields(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of a config.json without the `LAYER_FIELDS` that the model's class does not have. Flags that
    turn the weights into another kind of model are refused, and parts that its kind does not have. This imports
    transformers, so it comes last.

    Raises:
        UserError: a flag is not what the class of the model has, or it has no such part.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return values
    for name in CLASS_FIELDS:
        given, usual = values.get(name), getattr(CONFIG_MAPPING[kind], name, False)
        require(
            given is None or bool(given) == bool(usual),
            f"{where}: {name}={given} makes another kind of model of a {kind}; drop the field",
        )
    for name in TEXT_PARTS:
        known = hasattr(CONFIG_MAPPING[kind], name) or name in CONFIG_MAPPING[kind].sub_configs
        require(known or values.get(name) is None, f"{where}: {name}: a {kind} has no such part; drop the field")
    # With is_causal=false transformers builds a decoder's mask as an encoder's. Encoders ignore the field.
    causal = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or values.get("is_causal") is not False
    require(causal, f"{where}: is_causal=false makes an encoder of a {kind}; drop the field")
    strange = {name for name in LAYER_FIELDS if not hasattr(CONFIG_MAPPING[kind], name)}
    return {name: value for name, value in values.items() if name not in strange}


def check_count(name: str, value: Any, where: str, tensors: int | None) -> None:
    """Refuse a number of layers, heads or experts that would fill the memory before the weights are looked at.

    Raises:
        UserError: no such model exists, or the weights hold fewer tensors than the model has layers.
    """
    if not COUNTED.search(name) or not isinstance(value, int):
        return
    known = tensors is not None and name.endswith(("layer", "layers"))
    limit = min(tensors, MAX_COUNT) if known else MAX_COUNT
    holds = f"its weights hold {tensors} tensors" if known else f"at most {MAX_COUNT} are taken"
    require(
        value >= 0, f"{where}: {name}={value} is not a valid count; use the config.json that belongs to the weights"
    )
    require(value <= limit, f"{where}: {name}={value}, but {holds}; use the config.json that belongs to the weights")
