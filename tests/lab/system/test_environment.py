"""What a process is started with: variables that libraries read, other launchers, locales, streams, limits, signals."""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from dual_lora.lab.commands.guard import run_command
from dual_lora.lab.commands.screen import Screen, open_screen
from dual_lora.lab.config.secrets import redact_secrets
from dual_lora.lab.errors import EXIT_STOPPED, EXIT_USER, Stopped, UserError, describe_machine_error
from dual_lora.lab.record.provenance import name_program, run_git
from dual_lora.lab.study.launch import process
from dual_lora.lab.system.environment import describe_variables, isolate_environment
from dual_lora.lab.system.libraries import hide_foreign_warnings, import_heavy_libraries
from dual_lora.lab.system.signals import STOP
from tasks.metrics import JAVA_OPTIONS
from tests.support.places import ROOT

PROCESSES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@pytest.fixture
def environment(monkeypatch):
    """A function that sets variables; those of processes and those it set are as before in the end."""
    for name in PROCESSES:
        monkeypatch.delenv(name, raising=False)

    def put(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("TORCHDYNAMO_SUPPRESS_ERRORS", "True"),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16"),
        ("XLA_USE_BF16", "yes"),
    ],
)
def test_the_settings_alone_decide_precision_compilation_and_accumulation(name, value, environment, capsys):
    environment(**{name: value})
    isolate_environment()
    assert name not in os.environ and name not in describe_variables()
    assert capsys.readouterr().err.startswith(f"ignored: {name}={value}; only the settings decide")


def test_what_accelerate_launch_sets_by_default_is_removed_without_a_word(environment, capsys):
    quiet = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_CPU_AFFINITY": "False"}
    environment(**quiet, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="1", ACCELERATE_DYNAMO_MODE="default")
    isolate_environment()
    assert capsys.readouterr().err == "" and not [name for name in os.environ if name.startswith("ACCELERATE_")]


def test_what_else_can_change_a_digit_is_recorded_without_secrets(environment):
    environment(DNNL_MAX_CPU_ISA="SSE41", CUBLAS_WORKSPACE_CONFIG=":16:8", TORCH_BLAS_PREFER_CUBLASLT="1", EDITOR="vi")
    environment(TORCH_HOME="https://me:secretword@host", LD_PRELOAD="/home/me/libopenblas.so:libomp.so /b/c.so")
    found = describe_variables()
    assert found["LD_PRELOAD"] == "libopenblas.so:libomp.so c.so"
    assert found["DNNL_MAX_CPU_ISA"] == "SSE41" and found["TORCH_BLAS_PREFER_CUBLASLT"] == "1" and "EDITOR" not in found
    assert found["TORCH_HOME"] == "https://***@host"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc: must be a whole number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=: must be a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be a whole number from 1"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE=²: must be a whole number"),
        ({"WORLD_SIZE": "2"}, "RANK=: must be a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2: must be below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "x"}, "LOCAL_RANK=x: must be"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1"}, "MASTER_ADDR: not set"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0: set without WORLD_SIZE"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2: started by mpirun or srun"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE=2: started by mpirun or srun"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true: not supported"),
        ({"ACCELERATE_USE_FSDP": "1"}, "ACCELERATE_USE_FSDP=1: not supported"),
    ],
)
def test_variables_of_launchers_that_make_no_sense_are_refused(variables, message, environment):
    environment(**variables)
    with pytest.raises(UserError) as caught:
        isolate_environment()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "variables",
    [{"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "x"}, {"PMI_SIZE": "1"}, {"MASTER_PORT": "8080"}],
)
def test_one_process_is_not_one_of_several_however_it_was_started(variables, environment):
    environment(**variables)
    isolate_environment()
    assert not variables.keys() & os.environ.keys()


def test_git_hooks_do_not_name_another_repository(environment, tmp_path):
    commit = run_git("rev-parse", "HEAD")
    environment(GIT_DIR=str(tmp_path), GIT_WORK_TREE=str(tmp_path))
    assert run_git("rev-parse", "HEAD") == commit


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("http://user:hunter2@mirror:9/x", "http://***@mirror:9/x"),
        ("https://ghtoken@github.com/a/b", "https://***@github.com/a/b"),
        ("the password is p@ss-w0rd, or hunter2", "the password is ***, or ***"),
        ("https://host/f?X-Amz-Signature=abc&part=2", "https://host/f?X-Amz-Signature=***&part=2"),
        ("https://host/f?access_token=abc", "https://host/f?access_token=***"),
        ("Authorization: Bearer abcdefghijkl", "Authorization: Bearer ***"),
        ("hf_abcdefghijklmnopqrstuvwx", "***"),
        ("ghp-1234 of AKIAZZ12", "*** of ***"),
        ("a pin 12k4 in x12k4x", "a pin *** in x12k4x"),
        ("http://me:pa/ss@host/x", "http://***@host/x"),
        ("https://host/f#access_token=abc", "https://host/f#access_token=***"),
        ("x --password=hunter --token abcdefgh", "x --password=*** --token ***"),
        ("x-api-key: abcdefgh, {'X-Auth-Token': 'abcdefgh'}", "x-api-key: ***, {'X-Auth-Token': '***'}"),
        ("Authorization: token abcdefgh", "Authorization: token ***"),
        ("of eyJhbGciOiJIUzI1.eyJzdWIiOiIx.SflKxwRJ-s", "of ***"),
        ("AIza" + "Sy" * 16 + " ASIA" + "A1" * 8 + " npm_" + "a1" * 16, "*** *** ***"),
        ("false, git@github.com:a/b, /home/me, model=a@b, http://host:80/a@b", None),
        ("tokens_per_second=1500 max_tokens=2048 --max-tokens 204800 --pad-token <endoftext>", None),
        ("task.max_new_tokens=64; tokens=12 key: value, the authorization: no", None),
    ],
)
def test_secrets_of_every_form_are_masked(text, masked, environment):
    environment(HF_ENDPOINT="http://user:hunter2@mirror:9", HTTPS_PROXY="http://me:p%40ss-w0rd@proxy:3")
    environment(GITHUB_PAT="ghp-1234", AWS_ACCESS_KEY_ID="AKIAZZ12", DOOR_KEY="12k4", SSH_KEY=str(Path.home()))
    environment(TOKENIZERS_PARALLELISM="false", SOME_TOKEN="false")
    assert redact_secrets(text) == (text if masked is None else masked)


SECRET_NAMES = """DB_PASS DB_PWD MYSQL_PWD MY_JWT SESSION_COOKIE API_KEY_2 API_KEY_PROD HF_TOKEN_READ TOKEN_PROD SECRETS
    API_KEY2 DOCKER_AUTH_CONFIG SLACK_WEBHOOK SLACK_WEBHOOK_URL SENTRY_DSN mytoken AWS_ACCESS_KEY_ID"""
OTHER_NAMES = "PWD OLDPWD PATH KEYBOARD TOKENIZERS_PARALLELISM MAX_TOKENS AUTH_TYPE TOKEN_TTL KEY_FILE PATIENCE"


@pytest.mark.parametrize("name", SECRET_NAMES.split())
@pytest.mark.parametrize("value", ["/a1b2c3d4", "a1b2c3d4\n"])
def test_names_of_secrets(name, value, environment):
    environment(**{name: value})
    assert redact_secrets(f"a {value.strip()} b") == "a *** b"


@pytest.mark.parametrize("name", OTHER_NAMES.split())
def test_names_of_no_secrets(name, environment):
    environment(**{name: "a1b2c3d4"})
    assert redact_secrets("a a1b2c3d4 b") == "a a1b2c3d4 b"


@pytest.mark.parametrize(
    ("value", "secret"),
    [
        ("me:hunter2@proxy:3128", "hunter2"),
        ("http://me:hunter/2@proxy:3128", "hunter/2"),
        ("http://me:hunter 2@proxy:3128", "hunter 2"),
        ("http://me:hunter@2@proxy:3128", "hunter@2"),
        ("https://a1b2c3d4@host", "a1b2c3d4"),
        ("https://a1b2c3d4:x-oauth-basic@host", "a1b2c3d4"),
    ],
)
def test_passwords_of_addresses(value, secret, environment):
    environment(HTTPS_PROXY=value)
    assert redact_secrets(f"a {secret} of me, x-oauth-basic") == "a *** of me, x-oauth-basic"


def test_options_of_java_are_not_recorded(environment):
    environment(**dict.fromkeys(JAVA_OPTIONS, "-Dhttps.proxyPassword=hunter"))
    assert not JAVA_OPTIONS & describe_variables().keys()


def test_a_screen_shows_what_its_encoding_can_and_no_secret(environment, monkeypatch):
    environment(MY_PASSWORD="correct-horse")
    reading, writing = os.pipe()
    before = type("Stream", (), {"encoding": "latin-1", "line_buffering": False, "flush": lambda self: None})()
    monkeypatch.setattr(sys, "stdout", before)
    screen = open_screen("stdout", writing)
    print("80.0 ± 0.1 – ‡ é ☃ correct-horse", file=screen, flush=True)
    assert isinstance(screen, Screen) and os.read(reading, 99) == b"80.0 \xb1 0.1 - ++ \xe9 ? ***\n"
    os.close(reading)
    print("nobody reads this", file=screen, flush=True)
    assert screen.buffer.raw.error


def test_warnings_of_libraries_do_not_reach_the_screen(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PYTHONWARNINGS=error
        hide_foreign_warnings()
        warnings.warn("a library's", stacklevel=1)
        from tasks import metrics

        exec(compile("import warnings; warnings.warn('our\\n own')", metrics.__file__, "exec"), {})
    assert capsys.readouterr().err == "warning: our own\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "out of memory (libtorch_cpu.so: f"),
        (RuntimeError("Failed to import x because of:\nlib.so: cannot allocate memory"), "out of memory (Failed to"),
        (
            RuntimeError("can't start new thread"),
            "can't start new thread; allow more processes and threads (ulimit -u)",
        ),
        (ImportError("x.so: Too many open files"), "x.so: Too many open files; allow more open files (ulimit -n)"),
    ],
)
def test_limits_met_while_importing_are_the_machines(error, message):
    assert describe_machine_error(error).startswith(message)


def test_a_second_signal_ends_at_once_with_the_same_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def work() -> int:
        with STOP.defer():
            os.kill(os.getpid(), signal.SIGINT)
            assert STOP.asked == "SIGINT"
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("not stopped")

    with pytest.raises(SystemExit) as end:
        run_command(work)
    assert end.value.code == EXIT_STOPPED
    assert capsys.readouterr().err.splitlines()[-1] == "train.py: stopped by SIGINT; the same command resumes from here"


def test_a_terminal_that_hangs_up_stops_the_work():
    with pytest.raises(Stopped, match="SIGHUP"), STOP.listen():
        os.kill(os.getpid(), signal.SIGHUP)


def test_the_runs_of_a_command_that_is_gone_stop(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    since = process.psutil.Process(child.pid).create_time()
    held = {"pid": child.pid, "since": since, "host": process.platform.node()}
    (tmp_path / "command.json").write_text(json.dumps(held))
    assert not process.is_command_gone(tmp_path)
    with pytest.raises(Stopped, match="SIGTERM"), STOP.listen(), process.stop_on_file(tmp_path / "stop"):
        child.kill()  # a zombie until it is waited for
        signal.pause()
    child.wait()
    assert process.is_command_gone(tmp_path)
    for other, gone in (({"host": "elsewhere"}, False), ({"pid": os.getpid()}, True)):
        (tmp_path / "command.json").write_text(json.dumps(held | other))
        assert process.is_command_gone(tmp_path) is gone


COMMANDS = {
    "folder gone": (
        ["-c", "import os, runpy, sys; os.rmdir(os.getcwd()); runpy.run_path(sys.argv[1], run_name='__main__')"],
        {},
    ),
    "warnings are errors": ([], {"PYTHONWARNINGS": "error"}),
    "safe path": ([], {"PYTHONSAFEPATH": "1"}),
    "ascii": ([], {"PYTHONIOENCODING": "ascii"}),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_end_is_one_line(name, tmp_path):
    """`eval.py` of a folder that holds no record, under odd conditions."""
    words, variables = COMMANDS[name]
    (tmp_path / "here").mkdir()
    command = [sys.executable, *words, str(ROOT / "eval.py"), "run=/nonexistent/±"]
    env = os.environ | variables
    done = subprocess.run(command, cwd=tmp_path / "here", env=env, capture_output=True, text=True, errors="replace")
    (line,) = done.stderr.splitlines()
    assert done.returncode == EXIT_USER and "Traceback" not in line
    assert "no longer exists" in line if name == "folder gone" else "run=/nonexistent/" in line


def test_help_needs_no_reader(tmp_path):
    done = subprocess.run(f"{sys.executable} eval.py --help >/dev/full", shell=True, cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and b"could not be written (No space left on device)" in done.stderr
    done = subprocess.run(f"{sys.executable} eval.py --help >&-", shell=True, cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and done.stderr == b""


@pytest.mark.parametrize("moment", [0.05, 0.3, 1.0])
def test_ctrl_c_during_imports_ends_the_command(moment):
    """The command has only just begun, or imports torch, when it is stopped."""
    code = "import signal, runpy, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from dual_lora.lab.commands.guard import run_command\n"
    code += "from dual_lora.lab.system.libraries import import_heavy_libraries\nprint('ready', flush=True)\n"
    code += "def main():\n with import_heavy_libraries():\n  import torch, transformers, peft\n"
    code += " import time; time.sleep(60)\n"
    code += "sys.argv = ['train.py']\nrun_command(main)"
    command = [sys.executable, "-c", code]
    env = os.environ | {"DUAL_LORA_LAZY": "1", "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(moment)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate()
    assert child.returncode == EXIT_STOPPED
    end = "train.py: stopped by SIGINT; the same command resumes from here\n"
    assert said in (end, f"\nSIGINT: stopping as soon as the libraries are imported; once more ends at once\n{end}")


def test_a_stop_waits_until_libraries_are_imported(capfd):
    """While they import, an exception may be lost: https://docs.python.org/3/c-api/dict.html of PyDict_GetItem."""
    done = []
    with pytest.raises(Stopped, match="SIGINT"), STOP.listen():
        with import_heavy_libraries():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("imported")
        done.append("went on")
    assert done == ["imported"]
    assert "SIGINT: stopping as soon as the libraries are imported; once more ends at once" in capfd.readouterr().err


def test_no_file_of_the_machine_is_left_open_for_the_screen(tmp_path):
    """With standard output closed, the first file that is opened would else get the screen's number."""
    code = "from dual_lora.lab.commands.screen import guard_screen\nimport os, sys\nwith guard_screen('x'):\n"
    code += f" number = os.open({str(tmp_path / 'f')!r}, os.O_CREAT | os.O_WRONLY)\n"
    code += " print('lost'); sys.exit(number < 3)"
    env = os.environ | {"DUAL_LORA_LAZY": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(f'{sys.executable} -c "{code}" >&-', shell=True, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert Path(tmp_path / "f").read_bytes() == b""


def test_folders_of_caches_are_not_recorded(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/home/somebody/cache")
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1")
    found = describe_variables()
    assert "TORCHINDUCTOR_CACHE_DIR" not in found and found["TORCHINDUCTOR_MAX_AUTOTUNE"] == "1"


def test_a_record_names_its_program_without_the_folders_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert name_program("train.py") == name_program(str(ROOT / "train.py")) == "train.py"
    assert name_program(str(ROOT / "dual_lora/bench/__main__.py")) == "dual_lora/bench/__main__.py"
    assert name_program(str(tmp_path / "queue.py")) == "queue.py"
