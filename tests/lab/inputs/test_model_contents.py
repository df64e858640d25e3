"""A model's folder whose files contradict each other or hold more than is loaded: the same outputs, or one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dual_lora.lab.inputs.model_config import fit_class_fields
from tests.support.model_folders import CONFIG, PAIRS, change, compare, copy, refused

WEIGHTS = "model.safetensors"


def add_tensors(folder, more):
    """Write the weights again, with the tensors that `more` makes of them."""
    held = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_file({name: t.contiguous() for name, t in (held | more(held)).items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


@pytest.mark.parametrize(("model", "field"), [("tiny-roberta", "num_hidden_layers"), ("tiny-gpt2", "n_layer")])
def test_layers_that_the_config_leaves_out_are_not_left_out(model, field, tmp_path):
    said = refused(change(copy(model, tmp_path), CONFIG, **{field: 2}), model)
    assert "hold layers that its config.json leaves out" in said


QUERY = "roberta.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    "name",
    [
        f"{QUERY}.lora_A.default.weight",
        f"{QUERY}.qweight",
        f"{QUERY}.weight_scale_inv",
        f"{QUERY}.weight.quant_state.x",
    ],
)
def test_parts_of_adapters_and_quantised_weights_are_not_left_out(name, tmp_path):
    folder = add_tensors(copy("tiny-roberta", tmp_path), lambda held: {name: torch.ones(2)})
    assert f"['{name}'], a part of quantized weights or of an adapter" in refused(folder, "tiny-roberta")


def swap_prefix(held):
    return {name.removeprefix("roberta."): torch.zeros_like(t) for name, t in held.items() if "query.weight" in name}


def name_as_of_old(held):
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma"): torch.zeros_like(t)
        for name, t in held.items()
        if "LayerNorm.weight" in name
    }


@pytest.mark.parametrize("more", [swap_prefix, name_as_of_old])
def test_a_parameter_under_two_names_is_refused(more, tmp_path):
    assert "one parameter under two names" in refused(add_tensors(copy("tiny-roberta", tmp_path), more), "tiny-roberta")


@pytest.mark.parametrize(
    "more",
    [
        lambda held: {"cls.predictions.bias": torch.ones(3)},
        lambda held: {"roberta.embeddings.position_ids": torch.ones(1, 5, dtype=torch.int64)},
    ],
)
def test_what_the_model_has_no_place_for_is_left_out(more, plain, tmp_path):
    compare(plain, "tiny-roberta", PAIRS["tiny-roberta"], add_tensors(copy("tiny-roberta", tmp_path), more))


def test_a_window_that_the_layers_do_not_have_does_not_change_decoding(plain, tmp_path):
    fields = {"sliding_window": 2, "attention_chunk_size": 3, "layer_types": ["sliding_attention"] * 3}
    compare(plain, "tiny-llama", "demo/restaurants", change(copy("tiny-llama", tmp_path), CONFIG, **fields))


def test_a_window_that_the_layers_have_is_kept():
    assert fit_class_fields({"model_type": "mistral", "sliding_window": 7}, "")["sliding_window"] == 7


def test_a_decoder_that_says_it_is_an_encoder_is_refused(tmp_path):
    assert "is_causal" in refused(change(copy("tiny-llama", tmp_path), CONFIG, is_causal=False), "tiny-llama")
    assert fit_class_fields({"model_type": "roberta", "is_causal": False}, "")


def test_a_field_given_twice_is_refused(tmp_path):
    folder = copy("tiny-roberta", tmp_path)
    text = (folder / CONFIG).read_text().rstrip().removesuffix("}")
    (folder / CONFIG).write_text(text + ', "hidden_act": "relu"}')
    assert "'hidden_act' occurs twice" in refused(folder, "tiny-roberta")


@pytest.mark.parametrize("model", ["tiny-roberta", "tiny-gpt2"])
def test_merges_are_not_left_out_at_random(model, plain, tmp_path):
    folder = copy(model, tmp_path)
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["dropout"] = 0.5
    (folder / "tokenizer.json").write_text(json.dumps(state))
    compare(plain, model, PAIRS[model], folder)


def test_special_tokens_that_two_files_name_differently_are_refused(tmp_path):
    folder = copy("tiny-llama", tmp_path)
    map_file = folder / "special_tokens_map.json"
    map_file.write_text(json.dumps({"eos_token": {"content": "<pad>"}}))
    said = refused(folder, "tiny-llama")
    assert "special_tokens_map.json: eos_token is '<pad>', but '</s>' in tokenizer_config.json; keep one" in said
