"""E2E, WebNLG and DART as LoRA trained and scored them: split layers, LoRA's beam search, the experiments' settings."""

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dual_lora import paper
from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.recorded import load_recorded_settings
from dual_lora.lab.config.schema import get_setting
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError
from dual_lora.lab.evaluate.evaluate import compute_outputs
from dual_lora.lab.evaluate.trained import load_trained_model
from dual_lora.lab.inputs.splits import load_split
from dual_lora.lab.model.adapt import attach_method, count_parameters
from dual_lora.lab.model.encode import IGNORED_LABEL, build_generation_encoder, encode_prompt
from dual_lora.lab.model.fused_layers import fuse_layers
from dual_lora.lab.model.load import load_model
from dual_lora.lab.record.identity import select_identity_settings
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.report.published import find_published_lines
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import find_outcomes
from dual_lora.lab.train.meta_step import build_meta_model
from dual_lora.lab.train.plan import count_adapted_modules
from dual_lora.lab.train.run import train_run
from dual_lora.lab.weights.updates import find_role, load_updates
from tests.support.published import get_row

SPLIT = ["model=tiny-gpt2", "model.split=[q,k,v]", "model.adapt=[q,v]"]
SHORT = ["train.max_steps=3", "train.max_examples=16", "train.batch_size=4", "eval.max_examples=4", "eval.before=false"]
SHORT += ["wandb.mode=disabled", "task.max_new_tokens=12"]
EXPERIMENTS = {"nlg": "e2e", "webnlg": "webnlg", "dart": "dart"}


def load(*words: str):
    """Return settings, task, model and tokenizer of a bundled model on the demo of texts."""
    chosen = load_settings(["task=demo/restaurants", *words])
    task = load_task(chosen)
    return chosen, task, *load_model(chosen, task)


# Split layers


@torch.inference_mode()
def test_a_split_model_computes_what_the_fused_one_does_and_is_it_once_fused_again():
    _, _, fused, _ = load("model=tiny-gpt2")
    _, _, split, _ = load(*SPLIT)
    ids = torch.randint(0, fused.config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    expected = fused.eval()(input_ids=ids).logits
    names = [name for name, _ in split.named_modules() if name.endswith("c_attn.k")]
    assert len(names) == fused.config.n_layer and expected.std() > 0.1
    torch.testing.assert_close(split.eval()(input_ids=ids).logits, expected, rtol=1e-6, atol=1e-6)
    again = fuse_layers(split).state_dict()
    assert again.keys() == fused.state_dict().keys()
    assert all(torch.equal(again[name], weight) for name, weight in fused.state_dict().items())


@pytest.mark.parametrize("method", ["lora", "dora", "dual_lora", "loha", "randlora"])
def test_every_method_adapts_the_blocks_it_is_told_to(method):
    chosen, task, base, _ = load(*SPLIT, f"method={method}")
    adapted = attach_method(base, chosen, task.form)
    assert count_adapted_modules(adapted) == {"q": base.config.n_layer, "v": base.config.n_layer}


def test_rank_4_trains_as_many_weights_as_loras_two_slices():
    words = ["model=gpt2-medium", "model.split=[q,k,v]", "task=e2e", "method.rank=4"]
    for method in ("lora", "dual_lora"):
        chosen = load_settings([*words, f"method={method}"])
        model = attach_method(build_meta_model(chosen, load_task(chosen)), chosen, "generation")
        assert count_parameters(model)["adapter_parameters"] == 24 * 2 * 4 * (1024 + 1024) == 393_216


@pytest.fixture(scope="module", params=["lora", "dual_lora"])
def trained(request, tmp_path_factory) -> Path:
    """The folder of a short run on the split model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RUNS", tmp_path_factory.mktemp("runs"))
        words = [*SPLIT, "task=demo/restaurants", "task.num_beams=4", "task.search=gpt2_beam", "train.lr=3e-2"]
        run = Run.prepare(load_settings([*words, f"method={request.param}", *SHORT]))
        train_run(run)
        return run.record.folder


def test_a_run_on_a_split_model_exports_to_plain_transformers(trained, tmp_path, capsys):
    assert evaluate_command([f"run={trained}"]) == 0  # every digit is found again
    assert evaluate_command([f"run={trained}", f"export={tmp_path / 'out'}"]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(paths.BUNDLED / "tiny-gpt2")
    assert plain.state_dict().keys() == base.state_dict().keys()
    for name, weight in base.state_dict().items():
        kept = torch.isclose(plain.state_dict()[name], weight, rtol=0, atol=1e-7)
        if name.endswith("c_attn.weight"):
            assert [part.all().item() for part in kept.chunk(3, -1)] == [False, True, False], name
        else:
            assert kept.all(), name


def test_the_exported_adapter_says_what_it_fits(trained, tmp_path):
    evaluate_command([f"run={trained}", f"export={tmp_path / 'out'}"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "model.split=[q,k,v]" in card and "adapter/" not in card and not (tmp_path / "out" / "adapter").exists()


def test_an_analysis_knows_the_blocks_by_their_roles(trained):
    settings, record = load_recorded_settings(trained), Record(trained)
    updates = load_updates(settings, record)
    assert {find_role(update.module, settings) for update in updates} == {"q", "v"}
    model, _ = load_trained_model(settings, record, load_task(settings))
    assert isinstance(model, PeftModel)
    for update in updates:
        layer = model.get_base_model().get_submodule(update.module)
        torch.testing.assert_close(update.get_change(), layer.get_delta_weight("default"))


def test_full_tuning_ignores_a_models_own_split_and_refuses_one_by_hand():
    with pytest.raises(UserError, match="^model.split=.*: method full trains every weight; drop it"):
        load_settings(["model=tiny-gpt2", "method=full", "model.split=[q,k,v]"])
    chosen = load_settings(["model=tiny-gpt2", "method=full", "model.split=[]"])
    assert "split" not in select_identity_settings(chosen)["model"]
    assert find_role("transformer.h.0.attn.c_attn", chosen) == "q/k/v"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["model=tiny-gpt2", "model.split=[q,k]"],
            r"model.split=\['q', 'k'\]: not the roles of one .*\[q,k,v\]",
        ),
        (["model=tiny-gpt2", "model.split=[q]"], "not the roles of one weight"),
        (["model=tiny-gpt2", "model.split=[q,k,z]"], "not the roles of one weight"),
        (["model=tiny-llama", "model.split=[q,k,v]"], "tiny-llama has no weight of several roles"),
        ([*SPLIT, "hardware=qlora"], r"hardware.base=nf4: its layers cannot be split; take model.split=\[\]"),
        ([*SPLIT, "hardware=fsdp2"], "hardware.sharding=full: its layers cannot be split"),
        (["model=tiny-gpt2", "task.search=gpt2_beam"], "task.search=gpt2_beam: only beam search uses it"),
        (["model=tiny-gpt2", "task.num_beams=4", "task.search=gpt_beam"], "Did you mean gpt2_beam"),
        (["model=tiny-roberta", "task=demo/sentiment", "task.search=gpt2_beam"], "demo/sentiment writes no text"),
        (["model=tiny-gpt2", "model.dropout=1"], r"model.dropout=1.0: must be in \[0, 1\)"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words, said):
    with pytest.raises(UserError, match=said) as error:
        load_settings(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.roles.o=x", "model.roles.up=x", "model.split=[o,up]"], "model.split=.*: tiny-gpt2 has no module .*x"),
        (["model.roles.o=wte", "model.roles.up=wte", "model.split=[o,up]"], "transformer.wte is not a fused layer"),
    ],
)
def test_a_model_without_such_a_layer_is_refused(words, said):
    with pytest.raises(UserError, match=said):
        load("model=tiny-gpt2", *words)


# Dropout


def test_dropout_is_set_within_the_base_model_alone():
    own, chosen = (load("model=tiny-gpt2", *more)[2] for more in ([], ["model.dropout=0.5"]))
    for model, rate in ((own, 0.0), (chosen, 0.5)):
        config = model.config
        assert config.resid_pdrop == config.attn_pdrop == config.embd_pdrop == rate
        assert config.summary_first_dropout == 0.1  # a head's
        ids = torch.arange(20)[None]
        once, twice = (model.train()(input_ids=ids).logits for _ in range(2))
        assert torch.equal(once, twice) == (rate == 0)


# LoRA's beam search


def ban_repeats(output: list[int], size: int) -> set[int]:
    """Return the tokens that would repeat an n-gram of the output."""
    last = output[len(output) - size + 1 :]
    if len(last) < size - 1:
        return set()
    return {output[i + size - 1] for i in range(len(output) - size + 1) if output[i : i + size - 1] == last}


def search_slowly(
    model, prompt: list[int], beams: int, tokens: int, ends: set[int], power: float, ngram: int, first: bool = True
) -> list[int]:
    """LoRA's search as its description has it, for one prompt, with neither cache nor early stop. first: bans come
    before the softmax. Returns the best output with its end."""
    alive: list[tuple[float, list[int]]] = [(0.0, [])]
    best: tuple[float, list[int]] = (-math.inf, [])
    for step in range(1, tokens + 1):
        grown = []
        for total, output in alive:
            logits = model(input_ids=torch.tensor([prompt + output])).logits[0, -1].float()
            banned = torch.tensor(sorted(ban_repeats(output, ngram)), dtype=torch.long)
            if first:
                logits[banned] = -torch.inf
            gains = logits.log_softmax(-1)
            gains[banned] = -torch.inf
            grown += [(total + gain, [*output, token]) for token, gain in enumerate(gains.tolist())]
        alive = []
        for total, output in sorted(grown, key=lambda pair: -pair[0])[:beams]:
            if output[-1] in ends or step == tokens:
                best = max(best, (total / step**power, output), key=lambda pair: pair[0])
            else:
                alive.append((total, output))
    return best[1]


@pytest.mark.parametrize("model", ["tiny-gpt2", "tiny-llama"])
@pytest.mark.parametrize("power", [0.8, -0.5])
def test_gpt2_beam_is_the_search_its_description_says(model, power):
    beams, tokens, ngram = 3, 12, 2
    words = [f"task.num_beams={beams}", f"task.max_new_tokens={tokens}", f"task.no_repeat_ngram={ngram}"]
    words += [f"task.length_penalty={power}", "eval.batch_size=4"]
    chosen, task, base, tokenizer = load(f"model={model}", *words, "task.search=gpt2_beam")
    rows = list(load_split(task, "validation", chosen).rows)[:6]
    found = compute_outputs(base, tokenizer, task, rows, chosen, "test")
    prompts = [encode_prompt(tokenizer, row, chosen) for row in rows]
    rules = (beams, tokens, {tokenizer.eos_token_id}, power, ngram)
    with torch.inference_mode():
        expected = [search_slowly(base.eval(), prompt, *rules) for prompt in prompts]
        late = [search_slowly(base, prompt, *rules, first=False) for prompt in prompts]
    assert found == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    usual = load_settings([f"model={model}", "task=demo/restaurants", *words])
    assert found != compute_outputs(base, tokenizer, task, rows, usual, "test")  # so the search matters here
    assert expected != late  # and so does the place of the ban


# The experiments


@pytest.mark.parametrize(("name", "task"), EXPERIMENTS.items())
def test_the_experiments_have_loras_settings(name, task):
    row = get_row(paper.load_table("lora_table11_gpt2_settings"), task=task, printed_in="paper")
    printed = {key: value.number for key, value in row.values.items()}
    printed |= {"length_penalty": 0.8, "lr": 2e-4}  # the script's, where the paper says 0.9
    keys = {"batch": "train.batch_size", "epochs": "train.epochs", "max_length": "task.max_length"}
    keys |= {"weight_decay": "train.weight_decay", "label_smoothing": "task.label_smoothing"}
    keys |= {"beams": "task.num_beams", "length_penalty": "task.length_penalty"}
    keys |= {"no_repeat_ngram": "task.no_repeat_ngram"}
    own = {"lr": "train.lr", "rank": "method.rank", "alpha": "method.alpha", "dropout": "method.dropout"}
    cells = Experiment.load(name, "full").compose_cells(["seed=0"])
    assert len(cells) >= 12
    for cell in cells:
        settings, theirs = cell.settings, cell.label == "LoRA, published rate"
        for key, setting in (keys | (own if theirs else {})).items():
            assert get_setting(settings, setting) == printed[key], (cell.label, setting)
        steps = settings.count_steps(settings.task.train_rows)
        assert math.ceil(steps * settings.task.warmup_ratio) == pytest.approx(printed["warmup"], abs=5)
        assert settings.train.max_grad_norm == 0 and settings.train.adam_epsilon == 1e-6 and settings.model.dropout == 0
        assert settings.task.search == "gpt2_beam" and settings.task.stop == ["\n\n"]
        assert settings.task.options["separator"] == "<|endoftext|>" and settings.train.schedule == "linear"
        assert (settings.model.split == ["q", "k", "v"]) == (settings.method.peft is not None)
        assert settings.model.adapt == ["q", "v"]
        scale = {"lora": 32 / 4, "dual_lora": 16 / math.sqrt(2 * 2)}
        assert settings.method.alpha in (None, 4 * 8, scale["dual_lora"] * 2) and scale["lora"] == scale["dual_lora"]


def test_a_record_is_encoded_as_lora_encodes_it():
    words = ["model=tiny-gpt2", "task=e2e", "task.options.separator='<|endoftext|>'"]
    chosen = load_settings(words)
    tokenizer = load(words[0])[3]
    task = load_task(chosen)
    meaning, text = "name : The Oak | Type : pub ", "The Oak is a pub ."
    row = task.build_row("train", 0, (meaning, ""), [text])
    example = build_generation_encoder(tokenizer, chosen)(row)
    record, sentence = (tokenizer(words)["input_ids"] for words in (meaning, f" {text}"))
    end = tokenizer.eos_token_id
    assert example["input_ids"] == [*record, end, *sentence, end]
    assert example["labels"] == [IGNORED_LABEL] * (len(record) + 1) + [*sentence, end]
    assert encode_prompt(tokenizer, row, chosen) == [*record, end]


def test_the_runs_of_others_stand_beside_the_printed_figure(runs_folder):
    experiment = Experiment.load("nlg", "full")
    cells = experiment.compose_cells(["seed=0", "model=gpt2-medium"])
    outcomes = find_outcomes(cells, "nlg")
    ours: dict = {}
    for outcome in outcomes:
        ours.setdefault(((outcome.settings.model.name,), outcome.label), []).append(outcome)
    lines = find_published_lines(experiment, outcomes, ours)[(("gpt2-medium",), "LoRA, published rate")]
    assert [cells["BLEU"].partition(" ")[0] for cells in lines.values()] == ["70.4±0.1", "68.65", "68.85", "68.87"]
    assert all("rerun" in name for name in list(lines)[1:]) and "rerun" not in next(iter(lines))
