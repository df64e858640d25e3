"""The three programs as a user starts them: each in a process of its own, which imports only what it asks for."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from dual_lora.lab.config.outside import hub
from dual_lora.lab.config.outside.addresses import check_proxies
from dual_lora.lab.config.paths import BUNDLED
from dual_lora.lab.errors import UserError
from tests.support.places import ROOT

SHORT = ["model=tiny-roberta", "task=demo/sentiment", "train.max_steps=2", "eval.max_examples=4", "eval.before=false"]
SHORT += ["train.max_examples=20", "wandb.mode=disabled"]


def start(script: str, *words: str, **env: str) -> subprocess.CompletedProcess:
    """Run a program to its end. The test's own process has imported everything, so this one must not be asked."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run([sys.executable, script, *words], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    done = start("train.py", *SHORT, DUAL_LORA_RUNS=str(runs))
    assert done.returncode == 0, done.stderr
    return next((runs / "adhoc").iterdir())


@pytest.mark.parametrize("words", [(), ("export={out}",), ("analyse=true",)], ids=["evaluate", "export", "analyse"])
def test_eval_reads_an_adapter_of_the_method(record, tmp_path, words):
    """PEFT knows the method only after the package has registered it."""
    done = start("eval.py", f"run={record}", *(word.format(out=tmp_path / "out") for word in words))
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


def test_a_relative_folder_of_runs_is_named_in_full(tmp_path):
    """Records name the runs that others start from; a report may be made from another folder."""
    code = "from dual_lora.lab.config import paths; print(paths.RUNS)"
    env = {**os.environ, "DUAL_LORA_RUNS": "mine", "PYTHONPATH": str(ROOT), "DUAL_LORA_LAZY": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{tmp_path / 'mine'}\n", "")


def test_a_run_that_never_began_takes_a_repaired_model(tmp_path):
    """What failed before anything was trained has nothing to protect: the model is repaired, the same command runs."""
    model = tmp_path / "model"
    shutil.copytree(BUNDLED / "tiny-llama", model)
    file = model / "tokenizer_config.json"
    words = ["model=tiny-llama", f"model.path={model}", "model.chat=true", "task.max_new_tokens=4", *SHORT[2:]]
    for template, code in (("no prompt in it", 2), ("{{ messages[0].content }}", 0)):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
        done = start("train.py", *words, DUAL_LORA_RUNS=str(tmp_path / "runs"))
        assert done.returncode == code, done.stderr
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "{{ messages[0].content }}."}))
    done = start("train.py", *words, DUAL_LORA_RUNS=str(tmp_path / "runs"))
    assert done.returncode == 2 and "started with a different tokenizer_config.json" in done.stderr


@pytest.mark.parametrize(
    ("script", "words", "name"),
    [
        ("train.py", SHORT, "DUAL_LORA_RUNS"),
        ("train.py", SHORT, "TMPDIR"),
        ("train.py", [*SHORT, "--config-dir", "{bad}"], "--config-dir"),
        ("eval.py", ["run={bad}"], "run"),
        ("eval.py", ["run=/", "export={bad}"], "export"),
    ],
)
def test_a_path_that_is_not_utf8_is_refused_before_anything_heavy(script, words, name, tmp_path):
    bad = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.mkdir(bad)
    done = start(script, *(word.format(bad=bad) for word in words), **({name: bad} if name.isupper() else {}))
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}: {name}={tmp_path}/?: has bytes that are not UTF-8"), done.stderr
    assert done.stderr.count("\n") == 1 and not os.listdir(bad)


BAD_ADDRESSES = [
    "http://host:notaport",
    "http://host:-1",
    "http://host:99999",
    "http://[::1",
    "http://me:hunter/2@host",
]


@pytest.mark.parametrize("address", [*BAD_ADDRESSES, "me:hunter@127.0.0.1:9", "http://me:12/hunter@host", "ftp://host"])
def test_a_hub_without_an_address_is_named_without_it(address, tmp_path):
    done = start("train.py", *SHORT, HF_ENDPOINT=address, DUAL_LORA_RUNS=str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("train.py: HF_ENDPOINT: not an address; unset it"), done
    assert done.stderr.count("\n") == 1 and not {"hunter", "notaport"} & set(re.findall(r"\w+", done.stderr))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "http_proxy"])
@pytest.mark.parametrize("address", [*BAD_ADDRESSES, "me:hunter/2@127.0.0.1:9"])
def test_a_proxy_without_an_address_is_named_where_the_hub_is_asked(name, address, monkeypatch):
    monkeypatch.setenv(name, address)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert not hub.is_hub_unreachable.__wrapped__()
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        UserError, match=f"^{name}: not an address; unset it, or give one like http://PROXY:3128"
    ) as found:
        hub.is_hub_unreachable.__wrapped__()
    assert "hunter" not in str(found.value)


@pytest.mark.parametrize(
    "address",
    ["me:pw@proxy:3128", "http://me:p%2Fw@proxy:3128", "socks5h://[::1]:9", "proxy", "http://proxy:8080/", ""],
)
def test_a_proxy_is_taken_as_libraries_take_it(address, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", address)
    check_proxies()
