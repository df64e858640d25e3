"""Nothing that is read can run code, and nothing secret is written."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dual_lora.lab.commands.train import asks_hydra, check_command
from dual_lora.lab.config.compose import list_choices, load_settings
from dual_lora.lab.config.paths import BUNDLED
from dual_lora.lab.config.secrets import redact_secrets
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError
from dual_lora.lab.model import source
from dual_lora.lab.model.load import load_model
from dual_lora.lab.model.source import NO_CODE, locate_model
from dual_lora.lab.record.record import Record
from tests.support.places import ROOT

FILES = [*ROOT.glob("*.py"), *(ROOT / "dual_lora").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")]
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
SECRETS = {
    "WANDB_API_KEY": "feedc0de" * 5,
    "HF_TOKEN": "hf_markerMarkerMarkerMarkerMarker",
    "MY_PASSWORD": "correct-horse-battery",
}


def calls(tree: ast.AST):
    """Yield every call: its name as written, and its keywords, `**` as None."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def unsafe(name: str, given: dict) -> bool:
    """Return whether a call can run what it reads."""
    last = name.rpartition(".")[2]
    remote = "trust_remote_code" in given or None in given  # ** of models.place or models.NO_CODE
    return (
        name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen")
        or name in ("torch.load", "load_state") and given.get("weights_only") != "True"
        or given.get("allow_pickle", "False") != "False"
        or given.get("shell", "False") != "False"
        or given.get("trust_remote_code", "False") != "False"
        or name == "yaml.load" and given.get("Loader") not in ("yaml.SafeLoader", "yaml.BaseLoader")
        or last in ("unsafe_load", "full_load", "instantiate")
        or last == "from_pretrained" and not name.startswith("PeftModel") and not remote
    )  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_is_read(path):
    tree = ast.parse(path.read_text())
    assert not imports(tree) & PICKLES
    assert not [name for name, given in calls(tree) if unsafe(name, given)]


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(x)",
        "np.load(x, allow_pickle=True)",
        "yaml.load(x)",
        "yaml.load(x, Loader=yaml.Loader)",
        "eval(x)",
        "AutoModel.from_pretrained(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_the_rule_bites(line):
    ((name, given),) = calls(ast.parse(line))
    assert unsafe(name, given)


def test_places_and_options_never_trust_code(monkeypatch):
    monkeypatch.setattr(source, "fetch_model", lambda settings, weights: BUNDLED / "tiny-llama")
    assert NO_CODE == {"trust_remote_code": False}
    for model in list_choices("model"):
        chosen = load_settings([f"model={model}", "task=glue/rte"])
        assert locate_model(chosen)["trust_remote_code"] is False


@pytest.mark.parametrize("kind", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_known_model_is_left_alone(kind, tmp_path):
    """A model whose kind transformers knows is loaded by transformers' own code, whatever it brings."""
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED / "tiny-roberta", folder)
    code = {
        "AutoConfig": "own.Own",
        "AutoModelForSequenceClassification": "own.Own",
        "AutoTokenizer": ["own.Own", None],
    }
    content = json.loads((folder / kind).read_text())
    (folder / kind).write_text(json.dumps(content | {"auto_map": code}))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'code-was-run')!r})\n")
    chosen = load_settings(["model=tiny-roberta", "task=demo/sentiment", f"model.path={folder}"])
    model, _ = load_model(chosen, load_task(chosen))
    assert type(model).__module__.startswith("transformers.") and not (tmp_path / "code-was-run").exists()


def held(folder: Path) -> list[str]:
    """Return which files of a folder hold a secret, in text or in W&B's binary log."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and any(value.encode() in path.read_bytes() for value in SECRETS.values()):
            found.append(path.name)
    return found


def test_no_secret_of_the_environment_reaches_record_mirror_or_screen(tmp_path):
    env = os.environ | SECRETS | {"DUAL_LORA_RUNS": str(tmp_path / "runs")}
    env.pop("WANDB_MODE", None)
    short = ["train.max_steps=1", "eval.max_examples=4", "wandb.mode=offline", "train.log_steps=1"]
    command = [sys.executable, "train.py", "model=tiny-roberta", "task=demo/sentiment", *short]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*.wandb")) and list(tmp_path.rglob("environment.json"))
    assert not held(tmp_path)
    assert not [value for value in SECRETS.values() if value in done.stdout + done.stderr]
    (run,) = (tmp_path / "runs/adhoc").iterdir()
    assert json.loads((run / "environment.json").read_text())["command"] == command[1:]


@pytest.mark.parametrize(
    "override",
    [
        "wandb.entity={WANDB_API_KEY}",
        "study=${{oc.env:WANDB_API_KEY}}",
        "model.path=https://user:{MY_PASSWORD}@host/model",
        "+method.peft.x=${{oc.env:HF_TOKEN}}",
    ],
)
def test_no_setting_takes_a_secret(override, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        check_command([override.format(**SECRETS)])
    assert not [value for value in SECRETS.values() if value in redact_secrets(str(caught.value))]


def test_what_is_written_of_an_error_holds_no_secret(tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SSH_KEY", str(tmp_path))  # where a key is, is no secret
    record = Record(tmp_path)
    record.write_failure(OSError(f"proxy http://me:{SECRETS['MY_PASSWORD']}@host refused; see {tmp_path}"))
    assert not held(tmp_path)
    assert record.read_failure()["message"] == f"proxy http://***@host refused; see {tmp_path}"


@pytest.mark.parametrize("option", ["--experimental-rerun", "--exp", "--config-dir", "-cd", "--run", "-sc"])
@pytest.mark.parametrize("shown", ["--version", "--cfg=job"])
def test_hydra_shows_and_does_nothing_else(shown, option):
    assert asks_hydra([shown])
    with pytest.raises(UserError, match=f"^{option}: no such option"):
        asks_hydra([shown, option, "x"])


def test_the_environment_cannot_be_asked_from_a_file(tmp_path):
    """OmegaConf's oc.env is gone, so no YAML of the repository or of a record can use it."""
    from omegaconf import OmegaConf
    from omegaconf.errors import UnsupportedInterpolationType

    with pytest.raises(UnsupportedInterpolationType):
        OmegaConf.to_container(OmegaConf.create({"a": "${oc.env:HOME}"}), resolve=True)
