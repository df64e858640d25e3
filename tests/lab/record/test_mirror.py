"""The W&B mirror: what reaches a server, and that no failure of W&B blocks or breaks a run."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pandas as pd
import psutil
import pytest
from matplotlib.figure import Figure

from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.record import mirror
from dual_lora.lab.record.mirror import Mirror, _describe_error, open_mirror
from dual_lora.lab.record.record import Record
from dual_lora.lab.train.run import open_run_mirror
from tests.support.places import ROOT
from tests.support.wandb_stub import WandbStub

KEY = "0123456789abcdef" * 3
LIMIT = 45.0  # seconds for what takes 5 or 8 on a machine that is free, and minutes or for ever without a limit
ROWS = [{"step": 10, "train/loss": 2.0}, {"step": 20, "train/loss": 1.0}, {"step": 10, "eval/accuracy": 0.5}]


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No settings or keys of whoever runs the tests, and a server that refuses unless a test names another."""
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)


@pytest.fixture
def patient(monkeypatch):
    """Wait for a server that answers for as long as a busy machine may need."""
    monkeypatch.setattr(mirror, "INIT_SECONDS", 60.0)
    monkeypatch.setattr(mirror, "FINISH_SECONDS", 60.0)


@pytest.fixture
def stub(monkeypatch, patient):
    with WandbStub() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server


@pytest.fixture
def start(tmp_path):
    """A function that opens a mirror in tmp_path/run; its warnings gather in `start.lines`."""

    def start(mode, run_id="r1", tags=("table1", "lora")):
        return open_mirror(
            mode,
            project="study",
            entity=None,
            run_id=run_id,
            name="lora-seed1",
            group="tiny/demo/lora",
            job_type="train",
            tags=list(tags),
            config={"method": {"r": 8}, "seed": 1},
            folder=tmp_path / "run",
            warn=start.lines.append,
        )

    start.lines = []
    return start


def fill(opened, exit_code=0):
    for row in ROWS:
        opened.log(row)
    opened.set_summary({"test/accuracy": 0.75})
    opened.finish(exit_code)


def check(run, exit_code=0):
    """Everything `start` and `fill` gave is in this run of the stub."""
    assert [{k: v for k, v in row.items() if k[0] != "_"} for row in run["rows"]] == ROWS
    assert run["summary"]["test/accuracy"] == 0.75 and run["summary"]["train/loss"] == 1.0
    assert run["config"]["method"] == {"r": 8} and run["config"]["seed"] == 1
    assert (run["project"], run["displayName"], run["jobType"]) == ("study", "lora-seed1", "train")
    assert run["groupName"] == "tiny/demo/lora" and sorted(run["tags"]) == ["lora", "table1"]
    assert run["exit_code"] == exit_code


def sync(line, stub):
    """Carry out the upload command that ends a warning line against the stub."""
    command = shlex.split(line[line.index("wandb sync") :])
    env = {**os.environ, "WANDB_BASE_URL": stub.url, "WANDB_API_KEY": KEY}
    subprocess.run([sys.executable, "-m", *command], env=env, check=True)


def test_tables_and_images_are_logged(start, tmp_path):
    Figure(figsize=(1, 1)).savefig(tmp_path / "figure.png")
    opened = start("offline")
    opened.send_report(
        {"values": pd.DataFrame({"label": ["LoRA"], "value": [81.0]})}, {"figure": tmp_path / "figure.png"}
    )
    opened.finish()
    (table,) = tmp_path.glob("run/wandb/*/files/media/table/values_*.table.json")
    assert json.loads(table.read_text()) == {"columns": ["label", "value"], "data": [["LoRA", 81.0]]}
    assert list(tmp_path.glob("run/wandb/*/files/media/images/figure_*.png")) and start.lines == []


def test_a_run_tells_what_it_is_for(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr("dual_lora.lab.train.run.open_mirror", lambda mode, **facts: given.update(facts))
    chosen = load_settings(["wandb.job_type=tune", "wandb.tags=[nlu,small]"])
    open_run_mirror(chosen, Record(tmp_path / "tiny-llama_s0_b55e49d5e5"))
    assert given["job_type"] == "tune" and given["tags"][-2:] == ["nlu", "small"]
    open_run_mirror(load_settings([]), Record(tmp_path / "tiny-llama_s0_b55e49d5e5"))
    assert given["job_type"] == "train" and "tune" not in given["tags"]


def test_a_mirror_gets_no_path_of_this_machine(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr("dual_lora.lab.train.run.open_mirror", lambda mode, **facts: given.update(facts))
    (tmp_path / "here").mkdir()
    here = str(tmp_path / "here")
    chosen = load_settings([])
    chosen = replace(chosen, data_dir=here, init_from=here, model=replace(chosen.model, path=here))
    open_run_mirror(chosen, Record(tmp_path / "tiny-llama_s0_b55e49d5e5"))
    config = given["config"]
    assert [config["data_dir"], config["init_from"], config["model"]["path"]] == ["here"] * 3
    assert str(tmp_path) not in json.dumps(config) and config["train"] == asdict(chosen.train)
    open_run_mirror(replace(chosen, init_from="some/adapter"), Record(tmp_path / "tiny-llama_s0_b55e49d5e5"))
    assert given["config"]["init_from"] == "some/adapter"


def opens_offline(start, reason):
    """An online mirror opens offline in time, with one line that gives the reason; returns the line."""
    began = time.monotonic()
    opened = start("online")
    assert time.monotonic() - began < LIMIT
    fill(opened)
    (line,) = start.lines
    assert reason in line and KEY not in line
    return line


def test_online(start, stub, key, capfd):
    opened = start("online")
    fill(opened, exit_code=3)
    opened.finish()
    opened.log({"step": 30})
    check(stub.runs["r1"], exit_code=3)
    assert start.lines == [] and capfd.readouterr() == ("", "")
    assert not [request for request in stub.requests if "otel" in request]


def test_two_runs_after_one_another(start, key, monkeypatch, patient):
    with WandbStub() as one, WandbStub() as two:
        for server, run_id in ((one, "r1"), (one, "r2"), (two, "r3")):
            monkeypatch.setenv("WANDB_BASE_URL", server.url)
            fill(start("online", run_id))
            check(server.runs[run_id])
        assert [*one.runs, *two.runs] == ["r1", "r2", "r3"] and start.lines == []


def test_a_run_left_open_does_not_swallow_the_next(start, stub, key):
    start("online", "r1").log(ROWS[0])
    fill(start("online", "r2"))
    check(stub.runs["r2"])
    assert len(stub.runs["r1"]["rows"]) == 1


def test_offline_uses_no_network_and_can_be_uploaded(start, stub, key, tmp_path, capfd):
    fill(start("offline"), exit_code=1)
    assert stub.requests == [] and start.lines == [] and capfd.readouterr() == ("", "")
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*-r1")
    sync(f"wandb sync {folder}", stub)
    check(stub.runs["r1"], exit_code=1)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_the_key_is_in_no_file(start, stub, key, tmp_path, mode):
    fill(start(mode))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_no_key(start, stub):
    line = opens_offline(start, "NoApiKey")
    assert stub.requests == []
    sync(line, stub)
    check(stub.runs["r1"])


def test_key_of_netrc(start, stub, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text(f"machine {stub.url.removeprefix('http://')} login user password {KEY}\n")
    (home / ".netrc").chmod(0o600)
    fill(start("online"))
    check(stub.runs["r1"])


def test_key_refused(start, stub, key, monkeypatch):
    monkeypatch.setattr(mirror, "INIT_SECONDS", 5.0)
    stub.status = 401
    opens_offline(start, "denied")


def test_malformed_key(start, stub, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    opens_offline(start, "WANDB_API_KEY invalid")


def test_port_refused(start, key):
    opens_offline(start, "refused")


def test_port_hangs(start, key, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        opens_offline(start, "Timed out")


def test_server_dies(start, stub, key, monkeypatch):
    monkeypatch.setattr(mirror, "FINISH_SECONDS", 8.0)
    opened = start("online")
    opened.log(ROWS[0])
    stub.die()
    began = time.monotonic()
    for row in ROWS[1:]:
        opened.log(row)
    opened.set_summary({"test/accuracy": 0.75})
    assert time.monotonic() - began < 4, "logging waits for the server"
    opened.finish()
    opened.finish()
    assert time.monotonic() - began < LIMIT
    (line,) = start.lines
    with WandbStub() as later:
        sync(line, later)
        check(later.runs["r1"])


def test_helper_process_dies(start, stub, key):
    opened = start("online")
    opened.log(ROWS[0])
    for child in psutil.Process().children():
        if child.name() == "wandb-core":
            child.kill()
            child.wait()
    fill(opened)
    (line,) = start.lines
    assert "stopped mirroring" in line
    fill(start("online", "r2"))
    check(stub.runs["r2"])


def test_disabled_does_not_import_wandb():
    code = """if True:
        import sys
        from dual_lora.lab.record.mirror import open_mirror
        facts = dict.fromkeys("project entity run_id name group job_type tags config folder".split())
        mirror = open_mirror("disabled", **facts)
        mirror.log({"step": 1}), mirror.set_summary({}), mirror.finish()
        print([name for name in ("wandb", "torch", "peft") if name in sys.modules])
    """
    env = {**os.environ, "DUAL_LORA_LAZY": "1"}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, cwd=ROOT, text=True).strip() == "[]"


def test_wandb_missing(start, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    fill(start("online"))
    (line,) = start.lines
    assert "off for this run" in line


def test_first_error_ends_the_mirroring(tmp_path):
    class Run:
        dir = str(tmp_path / "files")
        calls = 0

        def log(self, row):
            self.calls += 1
            raise RuntimeError("broken\nin two lines")

        summary = {}

        def finish(self, exit_code):
            raise RuntimeError("broken again")

    run, lines = Run(), []
    fill(Mirror(run, lines.append))
    assert run.calls == 1 and run.summary == {}
    assert len(lines) == 1 and "RuntimeError: broken)" in lines[0] and str(tmp_path) in lines[0]


def test_unknown_mode(start):
    with pytest.raises(ValueError, match="dryrun"):
        start("dryrun")


def test_what_wandb_refuses_is_named_with_its_field_and_no_secret(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secretword@proxy:3")
    import wandb

    with pytest.raises(ValueError) as caught:
        wandb.Settings(run_tags=("x" * 65,))
    assert _describe_error(caught.value).startswith("ValidationError: run_tags: ")
    error = ConnectionError("no http://me:secretword@proxy:3\nmore")
    assert _describe_error(error) == "ConnectionError: no http://***@proxy:3"


def test_tags_are_cut_to_what_wandb_takes(monkeypatch, start):
    given = {}
    monkeypatch.setattr("dual_lora.lab.record.mirror._start_run", lambda mode, facts, warn: given.update(facts))
    start("offline", tags=["a" * 70, "b"])
    assert given["tags"] == ["a" * 64, "b"]
