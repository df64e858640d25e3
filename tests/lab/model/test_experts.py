"""Mixtures of experts: transformers holds the experts of a layer as stacks of matrices, which no method adapts."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from dual_lora.lab.commands.train import train_command
from dual_lora.lab.model.adapt import count_stacked_weights
from tests.lab.model.test_any_model import SHORT, save_model
from tests.support.model_folders import copy, refused

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}


@pytest.mark.parametrize("method", ["dual_lora", "lora", "full"])
def test_all_linear_layers_without_the_experts_is_a_warning(method, tmp_path, runs_folder, capsys):
    folder = save_model(tmp_path / "own", "qwen3_moe", AutoModelForCausalLM, num_key_value_heads=1, **EXPERTS)
    held = AutoModelForCausalLM.from_pretrained(folder)
    stacked = sum(p.numel() for name, p in held.named_parameters() if ".experts." in name)
    command = [f"model={folder}", "task=demo/sentiment", f"method={method}", "eval.before=false", *SHORT]
    assert train_command(command) == 0
    (path,) = runs_folder.glob("adhoc/*/result.json")
    result = json.loads(path.read_text())
    if method != "dual_lora":  # PEFT puts LoRA on the experts, too
        assert result["warnings"] == []
        return
    share = stacked / result["parameters"]
    (warning,) = [text for text in result["warnings"] if "stacks of matrices" in text]
    assert warning.startswith(f"{share:.0%} of the weights are stacks of matrices, as in model.layers.0.mlp.experts;")
    assert warning in " ".join(capsys.readouterr().out.split())


def test_convolutions_and_vectors_are_no_stacks():
    frozen = [torch.nn.Conv1d(2, 3, 4), torch.nn.Linear(2, 3), torch.nn.Embedding(2, 3), torch.nn.LayerNorm(2)]
    for module in frozen:
        module.requires_grad_(False)
        assert count_stacked_weights(module) == 0


def test_a_type_that_cannot_classify_says_so(tmp_path, runs_folder, capsys):
    folder = save_model(tmp_path / "own", "olmoe", AutoModelForCausalLM, num_experts=4, num_experts_per_tok=2)
    assert train_command([f"model={folder}", "task=demo/sentiment", *SHORT]) == 2
    assert "transformers has no model of this architecture for this form of task" in capsys.readouterr().err


def test_special_tokens_that_two_files_name_differently_are_refused(tmp_path):
    folder = copy("tiny-llama", tmp_path)
    map_file = folder / "special_tokens_map.json"
    map_file.write_text(json.dumps({"eos_token": {"content": "<pad>"}}))
    said = refused(folder, "tiny-llama")
    assert "special_tokens_map.json: eos_token is '<pad>', but '</s>' in tokenizer_config.json; keep one" in said
