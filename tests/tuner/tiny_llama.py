"""A Llama of 2 layers and 64 words, adapters on it, and batches for it."""

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from dual_lora import DualLoraConfig


def llama(**fields):
    return LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": 64,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 32,
                "pad_token_id": 0,
                **fields,
            }
        )
    )


def adapted(model=None, **fields):
    fields = {"r": 8, "scale_warmup_steps": 3, "target_modules": "all-linear", **fields}
    return get_peft_model(model or llama(), DualLoraConfig(**fields))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def batches(n, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 64, (4, 12), generator=generator) for _ in range(n)]
