"""Exports with cards of the merged model and of the adapter, and their way to the hub."""

import json
import re
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard

from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.recorded import load_recorded_settings
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError
from dual_lora.lab.evaluate import push
from dual_lora.lab.evaluate.export import compute_probe_logits
from dual_lora.lab.evaluate.model_card import describe_base, format_about, format_adapter_card, format_model_card
from dual_lora.lab.evaluate.trained import load_trained_model
from dual_lora.lab.record.record import Record
from tests.support.finished_runs import export

TOKEN = "hf_" + "a1B2c3D4" * 4


class Hub:
    """Stands for huggingface_hub's API, of which one call may be refused."""

    def __init__(self, calls: list, refused: str | None = None) -> None:
        self.calls, self.refused = calls, refused

    def create_repo(self, name, **options):
        self.calls.append((name, options))

    def upload_folder(self, repo_id, folder_path, **options):
        if self.refused:
            raise RuntimeError(f"403 Forbidden {self.refused}")
        self.calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))


@pytest.fixture
def online(monkeypatch):
    """A hub that answers, with a token; what it is asked for gathers in the list that is returned."""
    calls: list = []
    monkeypatch.setattr(push, "is_offline", lambda: False)
    monkeypatch.setattr(push, "get_token", lambda: TOKEN)
    monkeypatch.setattr(push, "HfApi", lambda: Hub(calls))
    return calls


def test_an_export_is_pushed_whole_into_a_private_repository(trained, tmp_path, online, capsys):
    assert export(trained, tmp_path / "out", "push_to_hub=me/model") == 0
    assert online[0] == ("me/model", {"private": True, "exist_ok": True})
    assert online[1] == ("me/model", sorted(path.name for path in (tmp_path / "out").iterdir()))
    said = capsys.readouterr()
    assert said.out.endswith("pushed: https://huggingface.co/me/model (new ones are private)\n")
    assert TOKEN not in said.out + said.err


def test_offline_the_folder_and_the_command_are_what_is_left(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(push, "is_offline", lambda: True)
    monkeypatch.setattr(push, "HfApi", lambda: pytest.fail("the hub was asked"))
    out = tmp_path / "my out"
    assert export(trained, out, "push_to_hub=me/model") == 0
    assert (
        f"not pushed (offline): {out} holds all of it; later: hf upload me/model '{out}' .\n" in capsys.readouterr().out
    )
    assert (out / "model.safetensors").is_file()


def test_a_push_that_the_hub_refuses_is_one_line_without_the_token(trained, tmp_path, online, monkeypatch):
    monkeypatch.setattr(push, "HfApi", lambda: Hub(online, refused="for me"))
    with pytest.raises(
        UserError, match=r"^push_to_hub=me/model: not pushed \(403 Forbidden for me\); .* holds"
    ) as error:
        export(trained, tmp_path / "out", "push_to_hub=me/model")
    assert "\n" not in str(error.value) and (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "token", "message"),
    [
        (["push_to_hub=me/model"], None, "push_to_hub=me/model: no token for the hub; run hf auth login"),
        (["push_to_hub=model"], TOKEN, "push_to_hub=model: names no owner; give ORG/NAME"),
        (["push_to_hub=a/b/c"], TOKEN, "push_to_hub=a/b/c: not a repository name; give ORG/NAME"),
        (["push_to_hub=a/-b"], TOKEN, "push_to_hub=a/-b: not a repository name; give ORG/NAME"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_export(
    words, token, message, trained, tmp_path, online, monkeypatch
):
    monkeypatch.setattr(push, "get_token", lambda: token)
    with pytest.raises(UserError, match=f"^{message}"):
        export(trained, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists() and not online


def test_without_an_export_there_is_nothing_to_push(trained):
    from dual_lora.lab.commands.evaluate import evaluate_command

    with pytest.raises(UserError, match="^push_to_hub: only with export=DIR"):
        evaluate_command([f"run={trained}", "push_to_hub=me/model"])


def test_cards_name_the_maps_and_the_base_of_the_run(trained):
    dual = ["task=glue/sst2", "method=dual_lora", "model=smollm2-135m"]
    own = load_settings([*dual, "+method.peft.magnitude=abs", "+method.peft.direction=identity"])
    assert "abs(B A) ⊙ (D C) to a weight" in format_about(own)
    assert describe_base(own) == f"{own.model.hub} ({own.model.revision})"
    moved = load_settings([*dual, "model.path=elsewhere", "hardware.base=nf4"])
    wanted = f"{moved.model.hub}, from files that were not compared with the hub's, in 4 bits (nf4)"
    assert describe_base(moved) == wanted
    settings = load_recorded_settings(trained)
    settings.method.peft["exclude_modules"] = ".*(q_proj|o_proj)"
    card = format_adapter_card(settings, Record(trained), load_task(settings))
    assert "(q_proj\\|o_proj)" in card


@pytest.mark.parametrize(
    ("rates", "start", "lines"),
    [
        ({"adapter": 0.002, "head": 0.002}, None, ["2, 0.002, 0"]),
        ({"head": 0.05}, None, ["2, 0.05, 0"]),
        ({"adapter": 0.002, "B": 0.032, "head": 0.002}, None, ["2, 0.002 (adapter) and 0.032 (B) and 0.002 (head), 0"]),
        ({}, "/home/me/runs/nlu/first_s0_1234", ["2, none, 0", "started from the weights of | first_s0_1234"]),
        ({"adapter": 0.1}, "org/adapter", ["2, 0.1, 0", "started from the weights of | org/adapter"]),
    ],
)
def test_cards_state_the_rates_that_trained_and_the_start(rates, start, lines, trained, monkeypatch):
    result = Record(trained).read_result() | {"learning_rates": rates}
    monkeypatch.setattr(Record, "read_result", lambda _: result)
    settings, record = replace(load_recorded_settings(trained), init_from=start), Record(trained)
    task = load_task(settings)
    cards = format_model_card(settings, record, task, "float32", True), format_adapter_card(settings, record, task)
    for card in cards:
        assert ("started from" in card) == (start is not None)
        assert all(f"| {line} |\n" in card for line in lines)


def test_an_adapters_card_says_what_it_is_and_loads_it(trained, tmp_path):
    assert export(trained, tmp_path / "out") == 0
    folder = tmp_path / "out/adapter"
    card, config = ModelCard.load(folder / "README.md"), json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-roberta"
    assert card.data.library_name == "peft" and card.data.tags == ["dual_lora", "peft", "dual-lora"]
    assert card.data.base_model is None, "the hub refuses a card that names a base model it does not have"
    for text in ((tmp_path / "out/README.md").read_text(), card.content):
        assert "[More Information Needed]" not in text and str(tmp_path) not in text and str(paths.ROOT) not in text
    for fact in ("r=16", "magnitude_ratio=0.5", "lora_alpha=16", "ReLU(B A)", trained.name, "accuracy", "PEFT 0."):
        assert fact in card.content
    (code,) = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    names: dict = {}
    base = paths.BUNDLED / "tiny-roberta"
    exec(code.replace('"BASE"', repr(str(base))).replace('"DIR"', repr(str(folder))), names)
    settings = load_recorded_settings(trained)
    known, _ = load_trained_model(settings, Record(trained), load_task(settings))
    found, expected = (compute_probe_logits(model.eval()) for model in (names["model"], known))
    torch.testing.assert_close(found, expected)
