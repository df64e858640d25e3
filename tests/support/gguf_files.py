"""A bundled model as a GGUF file."""

import json

import gguf
import torch
from safetensors.torch import load_file

from dual_lora.lab.config.paths import BUNDLED

SAVED = BUNDLED / "tiny-llama"

NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
NAMES |= {f"self_attn.{r}_proj": f"attn_{r}" for r in "qkv"} | {"self_attn.o_proj": "attn_output"}
NAMES |= {f"mlp.{r}_proj": f"ffn_{r}" for r in ("gate", "up", "down")}
NAMES |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def name_there(name: str) -> str:
    """Return llama.cpp's name of a tensor."""
    name = name.removeprefix("model.").removesuffix(".weight")
    layer = name.split(".")[1] if name.startswith("layers.") else None
    own = NAMES[name.removeprefix(f"layers.{layer}.")]
    return f"blk.{layer}.{own}.weight" if layer else f"{own}.weight"


def turned(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the rows of q or k in llama.cpp's order, where the two numbers that a position turns are neighbours."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(path, architecture="llama", cut="gpt-2", template=None, more=None, extra=(), split=0):
    """Write the bundled model as llama.cpp's converter does. split: at most so many weights a file; 0: one file."""
    config, words = (json.loads((SAVED / f"{n}.json").read_text()) for n in ("config", "tokenizer"))
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    out = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    out.add_context_length(config["max_position_embeddings"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_embedding_length(config["hidden_size"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(heads["q"])
    out.add_head_count_kv(heads["k"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    out.add_rope_dimension_count(config["head_dim"])
    out.add_vocab_size(config["vocab_size"])
    out.add_tokenizer_model("gpt2")
    if cut:
        out.add_tokenizer_pre(cut)
    vocabulary = words["model"]["vocab"]
    out.add_token_list(sorted(vocabulary, key=vocabulary.get))
    special = {token["id"] for token in words["added_tokens"]}
    out.add_token_types([3 if i in special else 1 for i in range(len(vocabulary))])
    out.add_token_merges([" ".join(pair) for pair in words["model"]["merges"]])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    out.add_pad_token_id(2)
    out.add_add_bos_token(True)
    if template:
        out.add_chat_template(template)
    for key, value in (more or {}).items():
        (out.add_string if isinstance(value, str) else out.add_uint16)(key, value)
    for name, weight in load_file(SAVED / "model.safetensors").items():
        part = name.rpartition("_proj")[0][-1:]
        out.add_tensor(name_there(name), (turned(weight, heads[part]) if part in heads else weight).numpy())
    for name in extra:
        out.add_tensor(name, torch.ones(16).numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
