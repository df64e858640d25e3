"""The cases Dual LoRA is entered with, and the small random models PEFT's tests are pointed at."""

import copy
from pathlib import Path
from types import ModuleType

import torch
import transformers
from peft import TaskType

from dual_lora import DualLoraConfig

# Identity before training and full scale after the first optimizer step.
RAMP = {"scale_warmup_steps": 1}
# The toy models of the custom group are 5 to 30 wide and trained for 3 steps of SGD at a rate of 0.5, after which every
# parameter must have moved by 1e-4. At the default sigma the direction group's gradient, smaller than the magnitude
# group's by the size of B A (tests/tuner: test_adam_moves_both_groups_alike_and_sgd_does_not), does not get that far in
# 3 cases, and one comparison at a tolerance of 1e-6, which PEFT widens to 1e-3 for LoHa, fails by rounding.
TOY = {**RAMP, "init_std": 0.2}

CUSTOM = [
    ("MLP", "target as str", {"target_modules": "lin0"}),
    ("MLP", "target as list", {"target_modules": ["lin0"]}),
    ("MLP", "last layer", {"target_modules": ["lin1"]}),
    ("MLP", "both layers", {"target_modules": ["lin0", "lin1"]}),
    ("MLP", "modules to save", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP", "r", {"target_modules": ["lin0"], "r": 4}),
    ("MLP", "r1 r2", {"target_modules": ["lin0"], "r1": 3, "r2": 5}),
    ("MLP", "rank pattern", {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 2}}),
    ("MLP", "alpha pattern", {"target_modules": ["lin0", "lin1"], "alpha_pattern": {"lin0": 3}}),
    ("MLP", "regex", {"target_modules": r"lin[01]"}),
    ("MLP", "exclude", {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]}),
    ("MLP", "fused", {"target_modules": ["lin0"], "fused_slices": {"lin0": [2, [0]]}}),
    ("MLP", "abs tanh", {"target_modules": ["lin0"], "magnitude": "abs", "direction": "tanh"}),
    ("EmbConv1D", "conv1d", {"target_modules": ["conv1d"]}),
    ("EmbConv1D", "embedding", {"target_modules": ["emb"]}),
    ("EmbConv1D", "both", {"target_modules": ["emb", "conv1d"]}),
    ("Conv1d", "", {"target_modules": ["conv1d"]}),
    ("Conv1dBigger", "", {"target_modules": ["conv1d"]}),
    ("Conv2d", "", {"target_modules": ["conv2d"]}),
    ("Conv2d", "and linear", {"target_modules": ["conv2d", "lin0"]}),
    ("Conv2d1x1", "", {"target_modules": ["conv2d"]}),
    ("Conv1dGroups", "", {"target_modules": ["conv1d"]}),
    ("Conv2dGroups", "", {"target_modules": ["conv2d"]}),
    ("Conv2dGroups2", "", {"target_modules": ["conv2d"]}),
    ("Conv3d", "", {"target_modules": ["conv3d"]}),
    ("Conv3d", "and linear", {"target_modules": ["conv3d", "lin0"]}),
]
TWO_ADAPTERS = {
    "same": ({"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    "different": ({"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    "different ranks": ({"target_modules": ["lin0"], "r": 8}, {"target_modules": ["lin0"], "r": 4}),
}
QUANTIZED = {"r": 4, "target_modules": ["q_proj", "v_proj"], **RAMP}


def tables(module: ModuleType, work: Path) -> dict[str, list]:
    """{name of a list in this test module of PEFT: what to put in its place}."""
    name = module.__name__.rpartition(".")[2]
    if name == "test_custom_models":
        return _custom(module)
    if name == "test_config":
        ours = [(DualLoraConfig, {})]
        return {"ALL_CONFIG_CLASSES": ours, "LAYER_INDEXING_CONFIG_CLASSES": ours}
    if name == "test_quantization":
        (path,) = _models(name, work)
        return {
            "TEST_CASES": [(DualLoraConfig, QUANTIZED)],
            "QUANTIZATION_BACKENDS": [_on_model(b, path) for b in module.QUANTIZATION_BACKENDS if "gptq" not in b.name],
        }
    if name not in TASKS:
        return {}
    lists = {v: _models(name, work) for v in vars(module) if v.startswith("PEFT_") and v.endswith("_TO_TEST")}
    for variable, task in TASKS[name].items():
        lists[variable] = [(DualLoraConfig, {"task_type": task, "target_modules": None, "r": 4, **RAMP})]
    return lists


def _custom(module: ModuleType) -> dict[str, list]:
    models = Path(module.__file__).read_text()  # older releases lack some of the toy models
    two = {"init_weights": False, **TOY}
    return {
        "TEST_CASES": [
            (f"{model} {label}".strip(), model, DualLoraConfig, {**fields, **TOY})
            for model, label, fields in CUSTOM
            if f'"{model}"' in models
        ],
        "ALL_PEFT_CONFIG_CLASSES": [DualLoraConfig],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": [
            (label, "dual_lora", DualLoraConfig, {**first, **two}, {**second, **two})
            for label, (first, second) in TWO_ADAPTERS.items()
        ],
    }


def _on_model(backend, path: str):
    backend = copy.copy(backend)
    backend.model_id = path
    return backend


TASKS = {
    "test_decoder_models": {"ALL_CONFIGS": TaskType.CAUSAL_LM},
    "test_encoder_decoder_models": {"ALL_CONFIGS": TaskType.SEQ_2_SEQ_LM},
    "test_feature_extraction_models": {"ALL_CONFIGS": TaskType.FEATURE_EXTRACTION},
    "test_seq_classifier": {"ALL_CONFIGS": TaskType.SEQ_CLS},
    "test_token_classification_qa": {"TOKEN_CLS_CONFIGS": TaskType.TOKEN_CLS, "QA_CONFIGS": TaskType.QUESTION_ANS},
}

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
WIDE = {**SMALL, "intermediate_size": 37}
LLAMA = {**WIDE, **IDS, "num_key_value_heads": 4}
OPT = {**SMALL, **IDS, "word_embed_proj_dim": 32, "ffn_dim": 37}
GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **IDS}
T5 = {"vocab_size": 99, "d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 2, "num_heads": 4}
BART = {
    **{f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in (("layers", 2), ("attention_heads", 4))},
    **{"vocab_size": 99, "d_model": 32, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "max_position_embeddings": 64},
    **{**IDS, "decoder_start_token_id": 2, "forced_eos_token_id": None},
}
# {test module: {folder, which keeps the words PEFT's tests look for in a model's name: (class, config, its fields)}}
MODELS = {
    "test_decoder_models": {
        "tiny-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", OPT),
        "tiny-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", GPT),
        "tiny-GPTJForCausalLM": (
            "GPTJForCausalLM",
            "GPTJConfig",
            {**GPT, "rotary_dim": 4, "tie_word_embeddings": False},
        ),
        "tiny-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
        "tiny-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
        "tiny-Gemma3ForCausalLM": (
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            {**LLAMA, "head_dim": 8, "sliding_window": 16},
        ),
    },
    "test_encoder_decoder_models": {
        "tiny-T5": ("T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": 0}),
        "tiny-Bart": ("BartForConditionalGeneration", "BartConfig", BART),
    },
    "test_feature_extraction_models": {
        "tiny-BertModel": ("BertModel", "BertConfig", WIDE),
        "tiny-RobertaModel": ("RobertaModel", "RobertaConfig", {**WIDE, **IDS}),
        "tiny-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", {**WIDE, "relative_attention": True}),
    },
    "test_seq_classifier": {
        "tiny-Bert": ("BertForSequenceClassification", "BertConfig", WIDE),
        "tiny-Roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**WIDE, **IDS}),
        "tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", "LlamaConfig", LLAMA),
    },
    "test_token_classification_qa": {
        "tiny-Bert": ("BertForTokenClassification", "BertConfig", WIDE),
        "tiny-Roberta": ("RobertaForTokenClassification", "RobertaConfig", {**WIDE, **IDS}),
    },
    "test_quantization": {
        "opt-125m": (
            "OPTForCausalLM",
            "OPTConfig",
            {**OPT, "num_hidden_layers": 12, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 64},
        ),
    },
}


def _models(module: str, work: Path) -> list[str]:
    """Paths of the models of a test module, written on first use."""
    paths = []
    for name, (model, config, fields) in MODELS[module].items():
        path = work / "models" / module / name
        if not path.exists():
            torch.manual_seed(0)
            getattr(transformers, model)(getattr(transformers, config)(**fields)).save_pretrained(path)
        paths.append(str(path))
    return paths
