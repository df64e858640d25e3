"""Models without a settings file: a folder or a hub id, with roles from the architecture, in records, plans and
messages."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.pytorch_utils import Conv1D

from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.commands.train import train_command
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.outside.models import load_families, name_folder
from dual_lora.lab.config.overrides import parse_overrides
from dual_lora.lab.config.paths import BUNDLED, list_choices
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.adapt import count_stacked_weights
from dual_lora.lab.model.load import build_target_pattern, list_held_dropouts, load_model
from dual_lora.lab.model.source import list_dropouts as list_config_dropouts
from dual_lora.lab.model.source import set_dropout
from dual_lora.lab.record.identity import compute_identity

SHORT = ["train.max_steps=2", "train.max_examples=8", "eval.max_examples=4", "wandb.mode=disabled"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL |= {"max_position_embeddings": 300}
WRITER = {"num_key_value_heads": 1, "head_dim": 16}
# Types whose configuration has no default sizes that make a model.
NEEDS = {"ministral": {"head_dim": 128}, "hunyuan_v1_dense": {"head_dim": 128}}


def save_model(folder: Path, kind: str, cls: type, tokenizer: str = "tiny-roberta", **values) -> Path:
    """Save a small model with random weights, as its type's own classes save it, and a tokenizer."""
    tokens = AutoTokenizer.from_pretrained(BUNDLED / tokenizer)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(tokens) + 8, **SMALL | values)
    cls.from_config(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


# Roles.


def build_layers(kind: str, cls: type) -> set[str] | None:
    """Return the names of the linear layers of a type, without the task's head; None if it has no model of a class."""
    config = AutoConfig.for_model(kind, **NEEDS.get(kind, {}))
    if type(config) not in cls._model_mapping:
        return None
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    with torch.device("meta"):
        model = cls.from_config(config)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    return {name for name in linear if re.search(r"\.\d+\.", name)}  # those of the layers


@pytest.mark.parametrize("kind", sorted(load_families()))
def test_the_roles_of_a_family_are_all_linear_layers_but_the_head(kind):
    family = load_families()[kind]
    cls = AutoModelForCausalLM if family["generates"] else AutoModelForSequenceClassification
    layers = build_layers(kind, cls)
    assert layers
    for role, pattern in family["roles"].items():
        assert any(re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) for name in layers), role
    known = load_settings(["model=tiny-llama"])
    known = replace(known, model=replace(known.model, roles=family["roles"], adapt=family["adapt"]))
    assert {name for name in layers if re.fullmatch(build_target_pattern(known), name)} == layers


@pytest.mark.parametrize("name", list_choices("model"))
def test_a_settings_file_has_the_head_of_its_family(name):
    model = load_settings([f"model={name}", "task=demo/sentiment"]).model
    values = json.loads((BUNDLED / name / "config.json").read_text()) if model.bundled else model.architecture
    family = load_families()[values["model_type"]]
    assert (model.head, model.generates) == (family["head"], family["generates"])


def test_a_type_of_no_family_has_peft_s_modules_or_all_linear_layers(tmp_path):
    file = save_model(tmp_path / "own", "bert", AutoModel) / "config.json"
    for kind, roles in (("codegen", {"peft": "qkv_proj"}), ("nomic_bert", {"linear": "all-linear"})):
        file.write_text(json.dumps({"model_type": kind, "architectures": ["XForCausalLM"]}))
        load_settings.__globals__["compose_choices"].cache_clear()
        model = load_settings([f"model={file.parent}", "task=demo/sentiment"]).model
        assert model.roles == roles and model.adapt == list(roles) and model.generates


def test_all_linear_layers_but_the_head_are_adapted_in_an_unknown_type(tmp_path, runs_folder, capsys):
    folder = save_model(tmp_path / "own", "nomic_bert", AutoModel)
    assert train_command([f"model={folder}", "task=demo/sentiment", "method=lora", "model.head=[pooler]", *SHORT]) == 0
    assert "nomic_bert: adapts all-linear (model.adapt, model.roles), in float32" in capsys.readouterr().out
    (adapter,) = runs_folder.glob("adhoc/*/adapter/adapter_model.safetensors")
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in load_file(adapter) if ".lora_" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


# The head.


def load(folder: Path, *words: str) -> torch.nn.Module:
    """Return a folder's model with the head of a task, as it is before training."""
    settings = load_settings([f"model={folder}", "task=demo/sentiment", *words])
    return load_model(settings, load_task(settings))[0]


SAVED_WITH_A_HEAD = {"eurobert": "dense", "deberta-v2": "pooler", "modernbert": "head"}


@pytest.mark.parametrize("kind", SAVED_WITH_A_HEAD)
def test_a_head_that_the_weights_bring_is_named_and_drawn_anew_or_refused(kind, tmp_path):
    part = SAVED_WITH_A_HEAD[kind]
    folder = save_model(tmp_path / "own", kind, AutoModelForSequenceClassification, pad_token_id=1)
    said = f"model=own: the head of a {kind} has {part}, too, which must be drawn anew and train in full; take "
    said = f"^{re.escape(said + f'model.head=[{part}]')}$"
    with pytest.raises(UserError, match=said):
        load(folder, "model.head=[]")
    with pytest.raises(UserError, match=said):
        train_command([f"model={folder}", "task=demo/sentiment", "model.head=[]", "plan=true"])
    held = load_file(folder / "model.safetensors")
    drawn = {name: p for name, p in load(folder, f"model.head=[{part}]").named_parameters() if name.startswith(part)}
    assert drawn and not any(torch.equal(p, held[name]) for name, p in drawn.items() if p.ndim > 1)


@pytest.mark.parametrize("kind", ["mobilebert", "bert"])
def test_a_base_without_its_pooler_says_how_the_head_gets_one(kind, tmp_path):
    folder = save_model(tmp_path / "own", kind, AutoModelForMaskedLM, true_hidden_size=32, embedding_size=32)
    with pytest.raises(UserError, match=r"they are another model's, or .*: then take model.head=\[pooler\]$"):
        load(folder, "model.head=[]")
    assert load(folder, "model.head=[pooler]")


# The dropout before the head.


def list_dropouts(folder: Path, *words: str) -> tuple[set[float], set[float]]:
    """Return the dropouts of a model within its base and before its head."""
    model = load(folder, *words)
    base = set(model.base_model.modules())
    found = [(module in base, module.p) for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    return tuple({p for inside, p in found if inside is within} for within in (True, False))


@pytest.mark.parametrize("kind", ["bert", "electra", "deberta-v2", "albert"])
def test_the_dropouts_of_base_and_head_are_set_apart(kind, tmp_path, capfd):
    folder = save_model(tmp_path / "own", kind, AutoModel, embedding_size=32)
    _, own = list_dropouts(folder)
    kept = own - {max(own)}  # of a pooler
    assert max(own) == 0.1 and not kept & {0.3, 0.4}
    base, head = list_dropouts(folder, "model.dropout=0.4")
    assert base - {0.0} == {0.4} and head == own
    base, head = list_dropouts(folder, "model.dropout=0.4", "task.head_dropout=0.3")
    assert base - {0.0} == {0.4} and head == kept | {0.3}
    assert "warning: model.dropout" not in capfd.readouterr().err


def test_a_head_with_the_dropout_of_its_base_is_told(tmp_path, capfd):
    folder = save_model(tmp_path / "own", "mpnet", AutoModel)
    assert list_dropouts(folder, "model.dropout=0.4") == ({0.4}, {0.4})
    follows = "the head of a mpnet has the dropout of the base model"
    assert f"warning: model.dropout=0.4: {follows}\n" in capfd.readouterr().err
    with pytest.raises(
        UserError, match=f"^task.head_dropout=0.3: {follows}; drop it, or take model.dropout=0.3 for both$"
    ):
        list_dropouts(folder, "task.head_dropout=0.3")
    assert list_dropouts(folder, "task.head_dropout=0.3", "model.dropout=0.3") == ({0.3}, {0.3})


def test_a_dropout_of_the_text_part_is_set(tmp_path):
    config = AutoConfig.for_model("gemma3")
    set_dropout(config, load_settings(["model=tiny-llama", "model.dropout=0.4"]))
    assert list_config_dropouts(config) == {"text_config.attention_dropout": 0.4}
    assert config.vision_config.attention_dropout == 0.0


UNREAD = {  # types, each with its sizes and the fields that it does not read
    "mpt": (
        {"d_model": 32, "n_layers": 2, "n_heads": 4, "emb_pdrop": 0.2, "resid_pdrop": 0.2},
        "resid_pdrop, emb_pdrop",
    ),
    "nemotron_h": (
        {"layers_block_type": ["mlp"] * 2, "num_key_value_heads": 2, "attention_dropout": 0.2, "hidden_dropout": 0.2},
        "attention_dropout, hidden_dropout",
    ),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_dropouts_that_a_model_does_not_read_are_refused_and_not_recorded(kind, tmp_path):
    sizes, fields = UNREAD[kind]
    folder = save_model(tmp_path / "own", kind, AutoModelForCausalLM, "tiny-llama", **sizes)
    assert list_held_dropouts(load(folder, "task=demo/choice")) == {}
    said = f"^model.dropout=0.4: a {kind} does not read its dropouts .{fields}.; drop it$"
    with pytest.raises(UserError, match=said):
        load(folder, "task=demo/choice", "model.dropout=0.4")
    with pytest.raises(UserError, match=said):
        train_command([f"model={folder}", "task=demo/choice", "model.dropout=0.4", "plan=true"])


def test_a_field_that_only_another_head_reads_is_no_dropout_before_the_head(tmp_path):
    folder = save_model(tmp_path / "own", "gpt_neox", AutoModel)
    with pytest.raises(UserError, match="^task.head_dropout=0.3: a gpt_neox has no dropout before its head; drop it$"):
        list_dropouts(folder, "task.head_dropout=0.3")


# Runs.


@pytest.mark.parametrize("method", ["lora", "dual_lora"])
def test_a_folder_of_bert_s_kind_is_trained_planned_and_evaluated_again(method, tmp_path, runs_folder, capsys):
    folder = save_model(tmp_path / "my BERT (v2)", "bert", AutoModel)
    words = [f"model='{folder}'", "task=demo/sentiment", f"method={method}"]
    assert train_command([*words, *SHORT]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "model my-BERT-v2 has no settings file. Its config.json says bert: adapts attention.self.query"
    )
    (run,) = (runs_folder / "adhoc").iterdir()
    assert run.name.startswith(f"my-BERT-v2_demo-sentiment_{method}_s0_")
    model = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert model["name"] == "my-BERT-v2" and model["path"] == str(folder) and model["head"] == ["pooler", "classifier"]
    assert evaluate_command([f"run={run}"]) == 0
    assert "reproduced exactly" in capsys.readouterr().out
    assert train_command([*words, "plan=true"]) == 0
    assert "adapts   2 query, 2 key, 2 value, 6 dense" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_a_folder_of_llama_s_kind_writes(kind, tmp_path, runs_folder, capsys):
    folder = save_model(tmp_path / "own", kind, AutoModelForCausalLM, "tiny-llama", **WRITER)
    words = [f"model={folder}", "task=demo/restaurants"]
    assert train_command([*words, *SHORT]) == 0
    (run,) = (runs_folder / "adhoc").iterdir()
    assert evaluate_command([f"run={run}"]) == 0
    assert "reproduced exactly" in capsys.readouterr().out
    assert train_command([*words, "plan=true"]) == 0
    assert "adapts   2 q_proj, 2 k_proj, 2 v_proj, 2 o_proj, 2 gate_proj" in capsys.readouterr().out


def test_what_is_found_can_be_overridden(tmp_path):
    folder = save_model(tmp_path / "own", "bert", AutoModel)
    words = [f"model={folder}", "task=demo/sentiment"]
    chosen = load_settings([*words, "model.adapt=[q,v]", "model.name=mine", "model.head=[]", "model.dtype=bfloat16"])
    assert chosen.model.adapt == ["q", "v"] and chosen.model.name == "mine" and chosen.model.head == []
    other = load_settings([*words, "+model.roles.x=pooler\\.dense", "model.adapt=[x]"])
    assert re.fullmatch(build_target_pattern(other), "bert.pooler.dense")


def test_the_place_of_a_model_does_not_matter_and_its_weights_do(tmp_path):
    folder = save_model(tmp_path / "a/own", "bert", AutoModel)
    moved = shutil.copytree(folder, tmp_path / "b/own")
    other = save_model(tmp_path / "c/own", "bert", AutoModel, initializer_range=0.3)
    first, second, third = (
        compute_identity(load_settings([f"model={place}", "task=demo/sentiment"])) for place in (folder, moved, other)
    )
    assert first == second != third


def test_weights_in_16_bits_are_read_as_bfloat16_if_the_model_writes(tmp_path):
    folder = save_model(tmp_path / "own", "qwen2", AutoModelForCausalLM, "tiny-llama", **WRITER)
    config = json.loads((folder / "config.json").read_text())
    for field, name in ({"dtype": "float16"}, "bfloat16"), ({"torch_dtype": "float32"}, "float32"):
        place = shutil.copytree(folder, tmp_path / name)
        (place / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"} | field))
        assert load_settings([f"model={place}", "task=demo/restaurants"]).model.dtype == name


# The hub.


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The hub's cache, as a download leaves it, with one model."""
    commit = "0123456789" * 4
    place = tmp_path / "hub/models--some-org--Some.Model_v2"
    save_model(place / "snapshots" / commit, "bert", AutoModel)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return place


def test_a_model_of_the_hub_has_its_own_name_and_a_commit(hub, runs_folder, capsys):
    words = ["model=some-org/Some.Model_v2", "task=demo/sentiment"]
    assert train_command([*words, *SHORT]) == 0
    assert "\nsome-org/Some.Model_v2  demo/sentiment  dual_lora" in capsys.readouterr().out
    (run,) = (runs_folder / "adhoc").iterdir()
    assert run.name.startswith("some-org-Some.Model_v2_demo-sentiment_dual_lora_s0_")
    model = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert model["name"] == model["hub"] == "some-org/Some.Model_v2" and model["revision"] == "0123456789" * 4
    assert json.loads((run / "result.json").read_text())["model"] == "some-org/Some.Model_v2"
    assert evaluate_command([f"run={run}"]) == 0
    assert train_command([*words, "plan=true"]) == 0
    assert "adapts   2 query, 2 key, 2 value, 6 dense" in capsys.readouterr().out


def test_a_revision_of_the_hub_is_its_commit(hub):
    (hub / "refs/v1").write_text("0123456789" * 4)
    task = "task=demo/sentiment"
    named = load_settings(["model=some-org/Some.Model_v2@v1", task])
    given = load_settings(["model=some-org/Some.Model_v2", "model.revision=v1", task])
    assert named == given and named.model.revision == "0123456789" * 4
    with pytest.raises(UserError, match="^model=some-org/Some.Model_v2@v2: cannot fetch its config.json"):
        load_settings(["model=some-org/Some.Model_v2@v2", task])


def test_a_folder_of_the_hub_s_cache_has_the_model_s_name(hub):
    assert name_folder(hub / "snapshots" / ("0123456789" * 4)) == "some-org/Some.Model_v2"
    assert name_folder(Path("/x/été & co.")) == "t-co" and name_folder(Path("/")) == "model"


# What is no model.


def drop(*names: str):
    """Return what makes a model's folder without some files."""

    def make(folder: Path) -> None:
        save_model(folder, "bert", AutoModel)
        for name in names:
            (folder / name).unlink()

    return make


def write(name: str, content: str):
    def make(folder: Path) -> None:
        drop()(folder)
        (folder / name).write_text(content)

    return make


def nested(folder: Path) -> None:
    save_model(folder / "best", "bert", AutoModel)


def inner(folder: Path) -> None:
    drop()(folder.parent)
    folder.mkdir()


def pickled(folder: Path) -> None:
    drop("model.safetensors")(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")


def adapter(folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")


def seq2seq(folder: Path) -> None:
    save_model(folder, "t5", AutoModelForSeq2SeqLM, d_model=32, d_kv=16, num_heads=2, num_layers=2, d_ff=64)


TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
LACKING = {
    "nothing": (lambda folder: None, "model=HERE: no such folder; give a saved Hugging Face model, or a model of the"),
    "a file": (lambda folder: folder.write_text(""), "model=HERE: a file; give a saved Hugging Face model"),
    "an empty folder": (Path.mkdir, "model=HERE: no config.json, no weights (*.safetensors), no tokenizer"),
    "no config": (drop("config.json"), "model=HERE: no config.json there; give the folder of a saved Hugging Face"),
    "no weights": (drop("model.safetensors"), "model=HERE: no weights (*.safetensors) there; give the folder"),
    "no tokenizer": (drop(*TOKENIZER), "model=HERE: no tokenizer (tokenizer.json) there; save it into the same folder"),
    "a pickle": (pickled, "no weights (*.safetensors) there, and pytorch_model.bin is a pickle, which is never read"),
    "a folder too high": (nested, "tokenizer (tokenizer.json) there, but a model in HERE/best; give model=HERE/best"),
    "a folder too deep": (inner, "there, but a model in ABOVE; give model=ABOVE"),
    "an adapter": (adapter, "tokenizer (tokenizer.json) there, but an adapter; give the model that it belongs to"),
    "no type": (write("config.json", "{}"), "model=HERE: its config.json names no model_type"),
    "damaged": (write("config.json", "{"), "HERE/config.json: damaged (Expecting property name"),
    "a list": (write("config.json", "[]"), "HERE/config.json: damaged (not a JSON object); save the model again"),
    "two stacks": (seq2seq, "model=HERE: t5 has an encoder and a decoder, which no task here trains; take one"),
}


@pytest.mark.parametrize("what", LACKING)
def test_a_folder_that_is_no_model_says_what_it_lacks(what, tmp_path):
    make, said = LACKING[what]
    folder = tmp_path / "above" / "model"
    folder.parent.mkdir()
    make(folder)
    with pytest.raises(UserError) as caught:
        load_settings([f"model={folder}", "task=demo/sentiment"])
    message = str(caught.value).replace(str(folder), "HERE").replace(str(folder.parent), "ABOVE")
    assert said in message and len(message.splitlines()) == 1 and "Did you mean" not in message, message


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "model=bert-base-uncased",
            " Any other is model=ORG/NAME, of the hub, or model=DIR. Known: deberta-v2-xxlarge, ",
        ),
        ("model=google-bert/bert-base-uncased", "cannot fetch its config.json from the hub"),
        ("model=x.gguf", "a GGUF file does not say all of its model; take model=NAME model.path=x.gguf"),
        ("model=a/b/c", "model=a/b/c: no such folder"),
        ("model.name=a/b/c", "model.name=a/b/c: only letters"),
    ],
)
def test_a_model_that_is_nowhere_is_answered_in_one_line(word, said):
    with pytest.raises(UserError) as caught:
        load_settings(parse_overrides([word, "task=demo/sentiment"])[0])
    assert said in str(caught.value) and "Did you mean" not in str(caught.value)


def test_a_name_of_conf_is_that_of_conf_even_if_a_folder_is_called_so(tmp_path, monkeypatch):
    (tmp_path / "tiny-roberta").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_settings(["model=tiny-roberta", "task=demo/sentiment"]).model.bundled
    assert (paths.CONF / "model/tiny-roberta.yaml").is_file()


# Mixtures of experts: transformers holds the experts of a layer as stacks of matrices, which no method adapts.


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
