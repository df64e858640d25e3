"""What a row gets does not depend on the rows beside it, whatever the model's architecture; a model that mixes rows is
refused before it is trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BloomConfig,
    ConvBertConfig,
    CTRLConfig,
    FalconConfig,
    FNetConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    ModernBertDecoderConfig,
    MptConfig,
    NystromformerConfig,
    OpenAIGPTConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    RwkvConfig,
    XLNetConfig,
)

from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.commands.train import train_command
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.paths import BUNDLED
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.evaluate.beam_search import search_beams
from dual_lora.lab.evaluate.evaluate import compute_outputs
from dual_lora.lab.evaluate.kv_cache import compute_next_logits, expand_cache, probe_prompts, read_prompts
from dual_lora.lab.evaluate.predict import PROBE_ROWS, check_batches, probe_padding, score_choices
from dual_lora.lab.inputs.splits import load_split
from dual_lora.lab.model.encode import get_position_limit
from dual_lora.lab.model.load import load_model, switch_mode

SHORT = ["eval.max_examples=8", "train.max_examples=8", "train.max_steps=2", "eval.before=false", "wandb.mode=disabled"]
PAD = 0
START = [7, 3, 9, 4, 8, 5, 6, 3, 7, 9, 4, 5]
PROMPTS = [START + [11, 12, 13], START + list(range(20, 33))]  # 15 and 25 tokens, of which 12 are shared
NEXT = [40, 41, 42, 43, 44, 45]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}


def build_gqa(cls: type, **values) -> PreTrainedConfig:
    return cls(**SIZES, num_key_value_heads=2, pad_token_id=PAD, vocab_size=values.pop("vocab_size", 100), **values)


# By column: a window or ALiBi counts padding between two tokens as distance. A window of 20 or 28 tokens is longer than
# the prompts that are tried; the second ends among the new tokens.
BY_COLUMN = {
    "mpt": lambda v=100: MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=v, max_seq_len=256),
    "gpt_neo": lambda v=100: GPTNeoConfig(**NEO, vocab_size=v, window_size=8, max_position_embeddings=256),
    "gpt_neo, 20": lambda v=100: GPTNeoConfig(**NEO, vocab_size=v, window_size=20, max_position_embeddings=256),
    "mistral": lambda v=100: build_gqa(MistralConfig, vocab_size=v, sliding_window=8),
    "mistral, 20": lambda v=100: build_gqa(MistralConfig, vocab_size=v, sliding_window=20),
    "mistral, 28": lambda v=100: build_gqa(MistralConfig, vocab_size=v, sliding_window=28),
    "gemma2": lambda v=100: build_gqa(Gemma2Config, vocab_size=v, head_dim=8, sliding_window=8),
    "phi3": lambda v=100: build_gqa(Phi3Config, vocab_size=v, sliding_window=8),
    "modernbert": lambda v=100: ModernBertDecoderConfig(
        **SIZES, vocab_size=v, local_attention=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1
    ),
}
BY_POSITION = {
    "llama": lambda: build_gqa(LlamaConfig),
    "gptj": lambda: GPTJConfig(**GPT, vocab_size=100, rotary_dim=4, n_positions=128),
    "gpt2": lambda: GPT2Config(**GPT, vocab_size=100),
    "opt": lambda: OPTConfig(
        **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
        vocab_size=100,
        ffn_dim=64,
        word_embed_proj_dim=32,
    ),
    "bloom": lambda: BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=100),
    "falcon": lambda: FalconConfig(
        **{k: v for k, v in SIZES.items() if k != "intermediate_size"}, vocab_size=100, alibi=True
    ),
    "ctrl": lambda: CTRLConfig(**GPT, vocab_size=100, dff=64, n_positions=128),
    "mistral, 4096": lambda: build_gqa(MistralConfig, sliding_window=4096),
}
WITHOUT_CACHE = {
    "rwkv": lambda v: RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=v, attention_hidden_size=32),
    "mamba": lambda v: MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=v, state_size=4),
    "lfm2": lambda v: build_gqa(Lfm2Config, vocab_size=v, layer_types=["conv", "full_attention"]),
    "openai": lambda v: OpenAIGPTConfig(**GPT, vocab_size=v, n_positions=256),
}
MIX_PADDING = {
    "fnet": lambda v: FNetConfig(
        vocab_size=v, hidden_size=32, num_hidden_layers=2, intermediate_size=64, max_position_embeddings=300
    ),
    "convbert": lambda v: ConvBertConfig(**SIZES, vocab_size=v, embedding_size=32),
    "nystromformer": lambda v: NystromformerConfig(**SIZES, vocab_size=v),
    "xlnet": lambda v: XLNetConfig(vocab_size=v, d_model=32, n_layer=2, n_head=4, d_inner=64),
}
MASK_PADDING = {
    "bert": lambda v: BertConfig(**SIZES, vocab_size=v),
    "gpt2": lambda v: GPT2Config(**GPT, vocab_size=v),
    "llama": lambda v: build_gqa(LlamaConfig, vocab_size=v),
}


def build_model(config: PreTrainedConfig, cls: type = AutoModelForCausalLM) -> PreTrainedModel:
    """Return a model with random weights so large that attention is not uniform."""
    torch.manual_seed(0)
    model = cls.from_config(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.mul_(5)
    return model


def save_random_model(folder: Path, build, cls: type = AutoModelForCausalLM) -> str:
    """Save a model with a bundled tokenizer; return the word that names it."""
    tokenizer = AutoTokenizer.from_pretrained(
        BUNDLED / ("tiny-llama" if cls is AutoModelForCausalLM else "tiny-roberta")
    )
    build_model(build(len(tokenizer) + 8), cls).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"model={folder}"


def measure_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", [*BY_COLUMN, *BY_POSITION])
@torch.inference_mode()
def test_every_next_token_of_a_batch_has_the_logits_of_its_prompt_alone(kind):
    model = build_model((BY_COLUMN | BY_POSITION)[kind]())
    inputs = read_prompts(model, PROMPTS, PAD, len(NEXT))
    rows, mask, cache = (inputs[name] for name in ("input_ids", "attention_mask", "past_key_values"))
    expand_cache(cache, 1, len(NEXT) + 1)
    for count in range(len(NEXT)):
        found = compute_next_logits(model, rows, mask, cache)
        for prompt, logits in zip(PROMPTS, found, strict=True):
            alone = model(input_ids=torch.tensor([prompt + NEXT[:count]])).logits[0, -1]
            assert measure_difference(logits, alone) < 1e-5
        rows = torch.nn.functional.pad(rows, (0, 1), value=NEXT[count])
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)


@pytest.mark.parametrize("kind", BY_POSITION)
def test_a_shared_prefix_is_read_once_where_positions_count(kind):
    model = build_model(BY_POSITION[kind]())
    assert probe_prompts(model, PAD) is True
    reads = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: reads.append(args[0].shape))
    read_prompts(model, PROMPTS, PAD, len(NEXT))
    assert reads == [(1, len(START)), (2, 12)]


@pytest.mark.parametrize("kind", BY_COLUMN)
@torch.inference_mode()
def test_beams_are_those_of_the_prompt_alone(kind):
    model = build_model(BY_COLUMN[kind]())
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": PAD, "eos_token_id": 99}
    inputs = read_prompts(model, PROMPTS, PAD, 6)
    made = model.generate(**inputs, **options, custom_generate=search_beams)[:, max(map(len, PROMPTS)) :]
    for prompt, tokens in zip(PROMPTS, made, strict=True):
        ids = torch.tensor([prompt])
        alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :]
        assert tokens[: len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize("kind", ["mpt", "mistral, 28"])
def test_likelihoods_of_a_batch_are_those_of_each_row_alone(kind, tmp_path, monkeypatch):
    folder = save_random_model(tmp_path / "own", BY_COLUMN[kind])
    found = {}
    for size in (1, 8):
        chosen = load_settings([folder, "task=demo/restaurants", f"eval.batch_size={size}"])
        task = load_task(chosen)
        model, tokenizer = load_model(chosen, task)
        monkeypatch.setattr(task, "choices", lambda row: [" the", " a restaurant near it", " it serves"])
        rows = list(load_split(task, "validation", chosen).rows)[:8]
        ranked = compute_outputs(model, tokenizer, task, rows, chosen, "test", score_choices)
        found[size] = [score for options in ranked for score, _ in options]
    assert found[1] == pytest.approx(found[8], rel=1e-5)


@pytest.mark.parametrize("kind", WITHOUT_CACHE)
def test_a_model_without_a_cache_of_keys_and_values_is_refused_before_training(kind, tmp_path, runs_folder, capsys):
    folder = save_random_model(tmp_path / kind, WITHOUT_CACHE[kind])
    assert train_command([folder, "task=demo/restaurants", "method=full", *SHORT]) == 2
    said = capsys.readouterr().err
    assert f"model={kind}: " in said and "does not read the prompts of a batch, through a key-value cache, as " in said
    assert not list(runs_folder.rglob("*.safetensors"))


def find_padding_difference(model: PreTrainedModel, tokenizer) -> float:
    texts = ["a film", "a film that is long and cold, and a soup"]
    with torch.inference_mode():
        together = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[0]
        return measure_difference(together, model(**tokenizer(texts[:1], return_tensors="pt")).logits[0])


@pytest.mark.parametrize("kind", [*MIX_PADDING, *MASK_PADDING])
def test_the_probe_of_padding_tells_models_that_mask_it_from_others(kind):
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "tiny-roberta", padding_side="right")
    config = (MIX_PADDING | MASK_PADDING)[kind](len(tokenizer) + 8)
    config.pad_token_id = tokenizer.pad_token_id
    model = build_model(config, AutoModelForSequenceClassification)
    rows = [dict(tokenizer(text)) for text in ("the soup was cold, and the film too long for me", "a film")]
    masks = kind in MASK_PADDING
    assert probe_padding(model, tokenizer, rows) == masks == (find_padding_difference(model, tokenizer) < 1e-5)


@pytest.mark.parametrize(("kind", "head"), [("fnet", "[]"), ("xlnet", "[sequence_summary,logits_proj]")])
def test_a_model_that_does_not_mask_padding_takes_one_row_at_a_time(kind, head, tmp_path, runs_folder, capsys):
    folder = save_random_model(tmp_path / kind, MIX_PADDING[kind], AutoModelForSequenceClassification)
    words = [folder, f"model.head={head}", "task=demo/sentiment", "method=full", *SHORT]
    assert train_command(words) == 2
    said = capsys.readouterr().err
    assert (
        f"model={kind}: " in said and "lets padding change its outputs, so they depend on the rows of a batch" in said
    )
    assert train_command([*words, "train.batch_size=1", "eval.batch_size=1"]) == 0
    (finished,) = runs_folder.glob("adhoc/*/result.json")
    assert json.loads(finished.read_text())["steps"] == 2


def test_a_run_of_such_a_model_from_before_the_check_is_evaluated_with_a_warning(
    tmp_path, runs_folder, monkeypatch, capsys
):
    folder = save_random_model(tmp_path / "fnet", MIX_PADDING["fnet"], AutoModelForSequenceClassification)
    monkeypatch.setattr("dual_lora.lab.train.run.check_batches", lambda *_: None)
    assert train_command([folder, "task=demo/sentiment", "method=full", *SHORT]) == 0
    (run,) = runs_folder.glob("adhoc/*")
    capsys.readouterr()
    assert evaluate_command([f"run={run}"]) == 0
    said = capsys.readouterr().err
    assert "warning: model=fnet: FNetForSequenceClassification lets padding change its outputs" in said
    assert "take another model, or eval.batch_size=1\n" in said
    evaluate_command([f"run={run}", "eval.batch_size=1"])
    assert "warning: model=fnet" not in capsys.readouterr().err


def test_a_model_of_which_nothing_trains_needs_single_rows_only_where_it_is_scored(tmp_path, runs_folder, capsys):
    folder = save_random_model(tmp_path / "fnet", MIX_PADDING["fnet"], AutoModelForSequenceClassification)
    words = [folder, "task=demo/sentiment", "method=none", "eval.max_examples=4", "wandb.mode=disabled"]
    assert train_command(words) == 2
    assert capsys.readouterr().err.endswith("take another model, or eval.batch_size=1\n")
    assert train_command([*words, "eval.batch_size=1"]) == 0


@pytest.mark.parametrize(("model", "task"), [("tiny-roberta", "demo/sentiment"), ("tiny-llama", "demo/restaurants")])
def test_the_check_of_batches_leaves_random_numbers_as_they_are(model, task):
    chosen = load_settings([f"model={model}", f"task={task}"])
    task = load_task(chosen)
    base, tokenizer = load_model(chosen, task)
    draws = []
    base.get_input_embeddings().register_forward_hook(lambda *_: draws.append(torch.rand(1)))
    state = torch.get_rng_state()
    check_batches(base.train(), tokenizer, task, list(load_split(task, "train", chosen).rows)[:PROBE_ROWS], chosen)
    assert draws and base.training and torch.equal(torch.get_rng_state(), state)


def test_a_model_without_a_limit_of_positions_has_none():
    model = AutoModelForSequenceClassification.from_config(MIX_PADDING["xlnet"](100))
    assert model.config.max_position_embeddings == -1 and get_position_limit(model) is None


CUT = ["task.max_length=30", "task.loss_on_prompt=true"]


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("words", "limit", "said"),
    [
        (["task=demo/sentiment"], 8, "of train has "),
        (["task=demo/restaurants"], 8, "of train has "),
        (["task=demo/restaurants", *CUT], 30, "of validation alone has "),
    ],
)
def test_a_row_that_would_change_the_positions_of_others_is_refused(
    field, words, limit, said, tmp_path, runs_folder, capsys
):
    """longrope has two sets of frequencies, and the longest row of a batch chooses."""
    folder = shutil.copytree(BUNDLED / "tiny-llama", tmp_path / "model")
    long = {"rope_type": "longrope", "factor": 32.0, "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
    long |= {"rope_theta": 10000.0, "original_max_position_embeddings": limit}
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(config | {field: long}))
    assert train_command(["model=tiny-llama", f"model.path={folder}", *words, *SHORT]) == 2
    line = capsys.readouterr().err
    assert f"tiny-llama takes {limit} tokens (longrope: a longer row would change the others of its batch), and" in line
    assert said in line


def test_a_model_returns_to_its_mode_even_if_what_is_tried_fails():
    model = torch.nn.Dropout().train()
    with pytest.raises(ZeroDivisionError), switch_mode(model, training=False):
        assert not model.training
        raise ZeroDivisionError
    assert model.training
