"""Runs that start from a saved adapter: a folder, or one of the hub, of the same method, ranks and scale."""

import json
import shutil

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from dual_lora import DualLoraConfig
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.outside.hub import fetch_files
from dual_lora.lab.errors import UserError
from dual_lora.lab.inputs.adapter_files import find_differing_fields
from dual_lora.lab.model.load import build_target_pattern, unwrap_adapter
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.run import train_run
from tests.support.places import ROOT
from tests.support.small_runs import FAMILIES, SHORT, attached, settings

MODEL = "tiny-llama"


def save_adapter(folder, method: str = "dual_lora", *overrides: str):
    """Save an adapter with random weights as PEFT does, and return its folder."""
    _, _, model, _ = attached(MODEL, method, *overrides)
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RUNS", tmp_path_factory.mktemp("trained"))
        return paths.RUNS / "adhoc" / train_run(Run.prepare(settings(MODEL)))["identity"]


def edit_weights(folder, name="adapter_model.safetensors"):
    save_file({key: 2 * tensor for key, tensor in load_file(folder / name).items()}, folder / name, {"format": "pt"})


def edit_config(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("method", ["dual_lora", "lora", "dora"])
def test_a_run_starts_from_the_weights_of_an_adapter(method, tmp_path, runs_folder):
    folder = save_adapter(tmp_path / "adapter", method)
    _, _, model, _ = attached(MODEL, method, f"init_from={folder}", "method.dropout=0.1")
    state = get_peft_model_state_dict(model)
    weights = load_file(folder / "adapter_model.safetensors").items()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights if tensor.ndim) and weights
    before = train_run(Run.prepare(settings(MODEL, f"method={method}", f"init_from={folder}")))
    fresh = train_run(Run.prepare(settings(MODEL, f"method={method}")))
    assert before["train_loss"] != fresh["train_loss"] and before["identity"] != fresh["identity"]


def test_identity_is_of_the_files_wherever_they_are(tmp_path, runs_folder):
    folder = save_adapter(tmp_path / "adapter")
    shutil.copytree(folder, tmp_path / "elsewhere/copy")
    places = (folder, tmp_path / "elsewhere/copy")
    names = {Run.prepare(settings(MODEL, f"init_from={place}")).identity for place in places}
    assert len(names) == 1
    edit_weights(folder)
    (other,) = {Run.prepare(settings(MODEL, f"init_from={folder}")).identity}
    assert other not in names | {Run.prepare(settings(MODEL)).identity}


def test_an_adapter_of_other_base_weights_is_refused(tmp_path, runs_folder):
    bundled = ROOT / "dual_lora/lab/model/bundled" / MODEL
    one, other = (shutil.copytree(bundled, tmp_path / name / MODEL) for name in ("one", "other"))
    edit_weights(other, "model.safetensors")

    def train(path, *words):
        chosen = ["model=llama-7b", f"model.path={path}", f"task={FAMILIES[MODEL]}", *SHORT, *words]
        return train_run(Run.prepare(load_settings(chosen)))

    first = train(one)
    assert "model.path is no llama-7b: hidden_size 128, not 4096, num_hidden_layers" in first["warnings"][0]
    folder = runs_folder / "adhoc" / first["identity"]
    for place in (folder, folder / "adapter"):
        said = (
            f"^init_from={place}: trained on other base weights .model.safetensors. of model=llama-7b; give the folder"
        )
        with pytest.raises(UserError, match=said):
            train(other, f"init_from={place}")
    assert train(one.rename(tmp_path / "moved"), f"init_from={folder}")["steps"] == 4
    (folder / "environment.json").write_text("{")
    for place in (folder, folder / "adapter"):
        with pytest.raises(UserError, match=f"^{folder}/environment.json: changed since the run"):
            train(other, f"init_from={place}")


def test_a_run_and_its_adapter_alone_start_alike(runs_folder):
    first = train_run(Run.prepare(settings(MODEL)))
    folder = runs_folder / "adhoc" / first["identity"]
    found = [train_run(Run.prepare(settings(MODEL, f"init_from={place}"))) for place in (folder, folder / "adapter")]
    assert found[0]["train_loss"] == found[1]["train_loss"] and found[0]["identity"] != found[1]["identity"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache, as a download leaves it, with the adapter some/adapter."""
    place, commit = tmp_path / "hub/models--some--adapter", "0" * 40
    save_adapter(place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    fetch_files.cache_clear()
    yield place / "snapshots" / commit
    fetch_files.cache_clear()


def test_an_adapter_of_the_hub_is_the_same_as_its_folder(hub, runs_folder):
    runs = [Run.prepare(settings(MODEL, f"init_from={place}")) for place in ("some/adapter", hub)]
    assert runs[0].identity == runs[1].identity
    assert train_run(runs[0])["steps"] == 4


def test_an_adapter_that_cannot_be_fetched_is_one_line(hub, runs_folder):
    with pytest.raises(UserError, match="^init_from=other/adapter: neither a folder here nor an adapter") as error:
        Run.prepare(settings(MODEL, "init_from=other/adapter"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], None),
        (["method.rank=8"], "an adapter with r=16, this run's has 8; take method.rank=16"),
        (["method=lora"], "an adapter with peft_type=DUAL_LORA, this run's has LORA; take method=dual_lora"),
        (["method.alpha=32"], "an adapter with lora_alpha=16, this run's has 32; take method.alpha=16"),
        (["+method.peft.magnitude=abs"], "with magnitude=relu, this run's has abs; take [+]method.peft.magnitude=relu"),
        (["+method.peft.freeze=direction"], "with freeze=null, this run's has direction; drop method.peft.freeze"),
        (["method.magnitude_ratio=0.25"], "with magnitude_ratio=0.5, this run's has 0.25; take method.magnitude_ratio"),
        (["method.r1=4", "method.r2=12"], "with magnitude_ratio=0.5, this run's has 0.25; take method.magnitude_ratio"),
        (["+method.peft.ste=identity", "method.dropout=0.1", "+method.peft.kernel=eager"], None),
    ],
)
def test_an_adapter_must_be_what_the_run_would_train(words, message, tmp_path, runs_folder):
    folder = save_adapter(tmp_path / "adapter")
    chosen = settings(MODEL, f"init_from={folder}", *words)
    if message is None:
        assert train_run(Run.prepare(chosen))["steps"] == 4
        return
    with pytest.raises(UserError, match=message):
        Run.prepare(chosen)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.adapt=[q]"], r"with model.adapt=\[q,k,v,up,down\], this run has \[q\]; take model.adapt=\[q,k,v"),
        (["method.rank=8"], "an adapter with r=16, this run's has 8; take method.rank=16"),
        (["method.alpha=8"], "an adapter with lora_alpha=16, this run's has 8; take method.alpha=16"),
        (["method.magnitude_ratio=0.25"], "with magnitude_ratio=0.5, this run's has 0.25; take"),
        (["method=lora"], "trained with method=dual_lora, this run has method=lora; take method=dual_lora"),
        (["model=tiny-gpt2"], "trained with model=tiny-llama, this run has model=tiny-gpt2; take model=tiny-llama"),
    ],
)
def test_a_run_to_start_from_must_be_what_the_run_would_train(words, message, trained):
    """Told from the records alone, before a folder is made."""
    with pytest.raises(UserError, match=f"^init_from={trained}: .*{message}"):
        Run.prepare(settings(MODEL, f"init_from={trained}", *words))


def test_what_only_peft_knows_is_refused_before_data_and_model_are_loaded(tmp_path, runs_folder, monkeypatch):
    """A field that this run's settings leave to PEFT."""
    folder = save_adapter(tmp_path / "adapter", "dora")
    chosen = settings(MODEL, "method=lora", f"init_from={folder}")
    monkeypatch.setattr("dual_lora.lab.train.run.load_run_rows", None)
    with pytest.raises(UserError, match="use_dora=true, this run's has false; take [+]method.peft.use_dora=true"):
        train_run(Run.prepare(chosen))


def test_other_modules_are_told_by_their_weights(tmp_path, runs_folder):
    """The configuration of an adapter may name the same modules in several ways."""
    folder = save_adapter(tmp_path / "adapter")
    with pytest.raises(UserError, match="does not fit at"):
        train_run(Run.prepare(settings(MODEL, f"init_from={folder}", "model.adapt=[q]")))


def test_a_setting_that_a_field_is_computed_from_is_named(tmp_path, runs_folder):
    folder = save_adapter(tmp_path / "adapter", "loha")
    with pytest.raises(UserError, match="an adapter with r=8, this run's has 4; take another method.rank"):
        Run.prepare(settings(MODEL, "method=loha", "method.rank=8", f"init_from={folder}"))


def test_pickles_are_not_read(tmp_path, runs_folder):
    folder = save_adapter(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=f"^init_from={folder}: no adapter_model.safetensors there, the only format"):
        Run.prepare(settings(MODEL, f"init_from={folder}"))


def test_a_model_of_another_name_is_told(tmp_path, runs_folder, capfd):
    folder = save_adapter(tmp_path / "adapter")
    attached(MODEL, "dual_lora", f"init_from={folder}")
    assert "warning" not in capfd.readouterr().err
    edit_config(folder, base_model_name_or_path="some/other-llama")
    attached(MODEL, "dual_lora", f"init_from={folder}")
    said = f"warning: init_from={folder}: trained on a model named other-llama, this run's is tiny-llama"
    assert said in capfd.readouterr().err


def test_what_another_version_of_peft_does_not_know_is_no_difference():
    own = {"r": 8, "lora_alpha": 8, "init_lora_weights": True, "use_dora": False}
    assert find_differing_fields(own | {"new": None, "init_lora_weights": "gaussian", "lora_dropout": 0.5}, own) == {}
    assert find_differing_fields(own | {"init_lora_weights": "pissa"}, own) == {"init_lora_weights": ("pissa", True)}
    assert find_differing_fields(own | {"use_dora": True, "new": 3}, own) == {
        "new": (3, None),
        "use_dora": (True, False),
    }


def test_a_set_of_pefts_equals_the_list_that_its_file_holds():
    own = {"feedforward_modules": {"up", "down"}}
    assert find_differing_fields({"feedforward_modules": ["down", "up"]}, own) == {}
    differing = {"feedforward_modules": (["up"], {"up", "down"})}
    assert find_differing_fields({"feedforward_modules": ["up"]}, own) == differing


def test_a_start_drawn_from_another_seed_is_refused(tmp_path, runs_folder):
    """Another randomised SVD leaves other base weights, which the trained factors do not fit."""
    words = ["method=pissa", "method.peft.init_lora_weights=pissa_niter_4", "eval.before=false"]
    run = runs_folder / "adhoc" / train_run(Run.prepare(settings(MODEL, *words)))["identity"]
    assert train_run(Run.prepare(settings(MODEL, *words, f"init_from={run}")))["steps"] == 4
    message = f"^init_from={run}: init_lora_weights=pissa_niter_4 draws the base .* 0 there and 1 here; take seed=0"
    with pytest.raises(UserError, match=message):
        Run.prepare(settings(MODEL, *words, f"init_from={run}", "seed=1"))
    with pytest.raises(UserError, match="draws the base weights from the seed, which an adapter does not say"):
        Run.prepare(settings(MODEL, *words, f"init_from={run / 'adapter'}"))


def test_an_adapter_made_with_peft_alone_is_taken(tmp_path, runs_folder):
    """With ranks given outright, which this run's settings give by their sum and ratio."""
    chosen, _, model, _ = attached(MODEL, "none")
    target = build_target_pattern(chosen)
    base = unwrap_adapter(model)
    config = DualLoraConfig(r1=8, r2=8, lora_alpha=16, target_modules=target, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "made")
    assert train_run(Run.prepare(settings(MODEL, f"init_from={tmp_path / 'made'}")))["steps"] == 4
