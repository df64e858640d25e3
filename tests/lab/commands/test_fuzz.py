"""Random settings and random damage to data files: whatever comes runs, or ends in one line.

The draws are the same every time. DUAL_LORA_FUZZ=N makes N times as many, others every time; `make test-slow` takes
ten times as many. A draw that fails is printed with what repeats it.
"""

import gzip
import os

import pytest
from hypothesis import HealthCheck, example, given, note, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

import tasks
from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.commands.train import check_command
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import GROUPS, iterate_keys, list_choices, load_settings
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import EXIT_FAILED, EXIT_OK, UserError
from dual_lora.lab.inputs.splits import load_split
from dual_lora.lab.model.encode import encode_rows
from dual_lora.lab.model.tokenizer import load_tokenizer
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.run import train_run
from tasks.base import build_features
from tests.support.official_files import (
    challenge_files,
    commonsense_files,
    dart_files,
    e2e_files,
    webnlg_files,
    write_official,
)
from tests.support.small_runs import plan_run

TIMES = int(os.environ.get("DUAL_LORA_FUZZ", 1))
SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


if TIMES == 1:  # Hypothesis would also draw numbers and words of the code itself: others after every change
    assert callable(providers._get_local_constants)
    providers._get_local_constants = Constants


def draws(count: int):
    """Return Hypothesis' settings for so many draws, the same ones every time unless more are asked for."""
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        print_blob=True,
        deadline=None,
        database=None,
        suppress_health_check=SHARED,
    )


def in_one_line(error: Exception) -> None:
    note(str(error))
    assert str(error).strip() and len(str(error).splitlines()) == 1, repr(str(error))


# Settings.

JUNK = [
    "",
    "null",
    "true",
    "nan",
    "inf",
    "-1",
    "0",
    "1e400",
    "1e-400",
    "[]",
    "{}",
    "[1,2]",
    "{a: 1}",
    "../x",
    "/",
    "'",
    '"',
]
JUNK += ["${seed}", "${nothing}", "${oc.env:HOME}", "${now:%Y}", "???", "a b", "\\", "é", "\x00", "x" * 300, "_target_"]
JUNK += [
    "1,2",
    "range(0,3)",
    "choice(1,2)",
    "0.5",
    "2",
    "16",
    "5000000000",
    "float32",
    "q",
    "2e-3",
    "${train}",
    "--help",
]
LEAVES = [key for key in list(iterate_keys()) if key not in ("plan", "force")]
KEYS = LEAVES + [f"method.peft.{name}" for name in ("r", "r1", "lora_alpha", "peft_type", "kernel", "ste", "nothing")]
KEYS += ["hydra.run.dir", "hydra/launcher", "task.options.scored", "nothing", "", "model.roles.q", "task.stop.0"]
texts = st.one_of(
    st.sampled_from(JUNK),
    st.integers(-5, 40).map(str),
    st.floats(0, 1).map(str),
    st.text(st.characters(codec="utf-8"), max_size=8),
)
signs = st.sampled_from(["", "", "", "", "+", "++", "~"])
chosen = st.sampled_from(GROUPS).flatmap(lambda group: st.sampled_from(list_choices(group)).map(f"{group}={{}}".format))
single = st.builds("{}{}={}".format, signs, st.sampled_from(KEYS), texts)
overrides = st.lists(st.one_of(single, single, chosen), min_size=1, max_size=4)
# Values of the right type, most of them possible, for runs that go further.
sane = st.lists(
    st.one_of(
        st.sampled_from(["method.rank", "train.batch_size", "eval.batch_size", "task.max_length", "train.accumulation"])
        .flatmap(lambda key: st.sampled_from(["1", "2", "3", "7", "16"]).map(f"{key}={{}}".format)),
        st.sampled_from(["method.alpha", "method.dropout", "train.lr", "train.weight_decay", "task.label_smoothing"])
        .flatmap(lambda key: st.sampled_from(["0", "1e-9", "0.3", "0.99", "40"]).map(f"{key}={{}}".format)),
        st.sampled_from(["model.adapt=[q]", "model.adapt=[o,v]", "train.max_grad_norm=0", "task.warmup_ratio=0.9"]),
        st.sampled_from(["train.max_examples=1", "train.schedule=cosine", "train.group_by_length=true", "seed=99"]),
        st.sampled_from(["model.dtype=bfloat16", "model.dtype=float16", "task.checkpoint=best", "train.save_steps=1"]),
    ),
    max_size=4,
)  # fmt: skip
pairs = st.sampled_from(
    ["tiny-roberta demo/sentiment", "tiny-llama demo/restaurants", "tiny-gpt2 demo/choice", "tiny-gpt2 demo/sentiment"]
)


@draws(100)
@given(many=st.booleans(), overrides=overrides)
@example(many=False, overrides=["task.name=metrics"])
@example(many=False, overrides=["method.r1=0", "method.r2=0"])
def test_any_settings_are_taken_or_refused_in_one_line(many, overrides, runs_folder):
    try:
        found = check_command([*["-m"][: int(many)], *overrides])
    except UserError as error:
        in_one_line(error)
        return
    for run in found:
        folder, chosen = run.record.folder, run.settings
        assert folder.parent.parent == paths.RUNS and folder.resolve().is_relative_to(paths.RUNS.resolve())
        assert "HOME" not in str(chosen)


@draws(5)
@given(pair=pairs, method=st.sampled_from(list_choices("method")), overrides=sane)
def test_a_plan_is_drawn_or_refused_in_one_line(pair, method, overrides, runs_folder):
    model, task = pair.split()
    try:
        plan_run(
            Run.prepare(load_settings([f"model={model}", f"task={task}", f"method={method}", "plan=true", *overrides]))
        )
    except UserError as error:
        in_one_line(error)


@draws(8)
@given(pair=pairs, method=st.sampled_from(list_choices("method")), overrides=sane)
def test_a_step_is_taken_or_refused_in_one_line(pair, method, overrides, runs_folder):
    model, task = pair.split()
    short = ["train.max_steps=1", "eval.max_examples=2", "eval.before=false", "wandb.mode=disabled", "force=true"]
    try:
        given = [f"model={model}", f"task={task}", f"method={method}", "task.max_new_tokens=4", *short, *overrides]
        result = train_run(Run.prepare(load_settings(given)))
        assert result["steps"] == (1 if result["trainable_parameters"] else 0)
    except UserError as error:
        in_one_line(error)


# Data files.


def glue(name: str):
    return lambda here: write_official(here, name)


KINDS = {
    "glue/rte train": ("tiny-roberta", glue("rte"), "glue/RTE/train.tsv"),
    "glue/rte validation": ("tiny-roberta", glue("rte"), "glue/RTE/dev.tsv"),
    "glue/sst2 train": ("tiny-roberta", glue("sst2"), "glue/SST-2/train.tsv"),
    "glue/stsb train": ("tiny-roberta", glue("stsb"), "glue/STS-B/train.tsv"),
    "glue/qqp train": ("tiny-roberta", glue("qqp"), "glue/QQP/train.tsv"),
    "e2e train": ("tiny-llama", e2e_files, "e2e/train.txt"),
    "e2e test": ("tiny-llama", e2e_files, "e2e/test.txt"),
    "e2e train task.options.references=official": ("tiny-llama", challenge_files, "e2e-dataset/trainset.csv"),
    "e2e test task.options.references=official": ("tiny-llama", challenge_files, "e2e-dataset/testset_w_refs.csv"),
    "webnlg train": ("tiny-llama", webnlg_files, "webnlg_challenge_2017/train.json"),
    "webnlg test": ("tiny-llama", webnlg_files, "webnlg_challenge_2017/test.json"),
    "dart train": ("tiny-llama", dart_files, "dart/dart-v1.1.1-full-train.json"),
    "dart test": ("tiny-llama", dart_files, "dart/dart-v1.1.1-full-test.json"),
    "commonsense train": ("tiny-llama", commonsense_files, "ft-training_set/commonsense_170k.json"),
    "commonsense piqa": ("tiny-llama", commonsense_files, "dataset/piqa/test.json"),
}


def swapped(content: bytes, i: int, j: int) -> bytes:
    """Return a table with two columns swapped in every line, whatever separates them."""
    for separator in (b"\t", b"||", b","):
        if separator in content:
            rows = [line.split(separator) for line in content.split(b"\n")]
            for row in rows:
                a, b = i % len(row), j % len(row)
                row[a], row[b] = row[b], row[a]
            return b"\n".join(separator.join(row) for row in rows)
    return content


def recoded(content: bytes, name: str) -> bytes:
    return content.decode(errors="ignore").encode(name, errors="replace")


places, few = st.integers(0, 600), st.integers(0, 12)
CODES = ["utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig", "cp037"]
PIECES = [b"\x00", b"\xff\xfe", b"\n", b"\r", b"\t\t", b'"', b"'", b"null", b"5", b"||", b"[", b"]}", b"\\ud800", b"\\"]
changes = st.one_of(
    st.builds(lambda at, n: lambda c: c[: at % (len(c) + 1)] + c[at % (len(c) + 1) + n :], places, few),
    st.builds(lambda at: lambda c: c[: at % (len(c) + 1)], places),
    st.builds(
        lambda at, junk: lambda c: c[: at % (len(c) + 1)] + junk + c[at % (len(c) + 1) :],
        places,
        st.one_of(st.binary(max_size=12), st.sampled_from(PIECES)),
    ),
    st.builds(lambda i, j: lambda c: swapped(c, i, j), few, few),
    st.sampled_from(CODES).map(lambda code: lambda c: recoded(c, code)),
    st.builds(lambda old, new: lambda c: c.replace(old, new), st.sampled_from([b'"', b"\n", b"0", b"entailment", b":"]),
              st.sampled_from([b"", b"\r\n", b"7", b"{", b"\xe9"])),
    st.binary(max_size=40).map(lambda junk: lambda c: c + b"\n" + junk + b"\n"),
    st.sampled_from([lambda c: c + c, lambda c: b"", lambda c: c.replace(b"\n", b"\r\n"), lambda c: b"\x80\x04" + c]),
)  # fmt: skip
packings = st.sampled_from(["plain", "plain", "plain", "packed", "cut", "named"])


def pack(path, content: bytes, how: str) -> None:
    """Write a file plain; or as a .gz, whole, cut short or by its name alone."""
    path.unlink(missing_ok=True)
    packed = {"packed": gzip.compress(content), "cut": gzip.compress(content)[:-9], "named": content}
    other = path.with_name(path.name + ".gz")
    other.unlink(missing_ok=True)
    (path if how == "plain" else other).write_bytes(packed.get(how, content))


@pytest.mark.parametrize("kind", KINDS)
def test_any_data_file_is_read_or_refused_in_one_line(kind, tmp_path):
    model, make, name = KINDS[kind]
    named, split, *option = kind.split()
    make(tmp_path)
    good = (tmp_path / name).read_bytes()
    given_settings = [f"model={model}", f"task={named}", f"data_dir={tmp_path}", *option]
    chosen = load_settings(given_settings)
    task = load_task(chosen)
    tokenizer = load_tokenizer(chosen)

    @draws(60)
    @given(st.lists(changes, min_size=1, max_size=3), packings)
    def check(changes, packing):
        content = good
        for change in changes:
            content = change(content)
        pack(tmp_path / name, content, packing)
        try:
            Run.prepare(chosen)
            rows = load_split(task, split, chosen).rows
        except UserError as error:
            in_one_line(error)
            assert name.rpartition("/")[2] in str(error) or "below it" in str(error)
            return
        assert rows.features == build_features(task.row_types) and len(rows) > 0
        assert len(encode_rows(rows, task, tokenizer, chosen)) == len(rows)
        output = {"classification": 0, "regression": 1.0, "generation": "a text"}[task.form]
        assert all(task.judge(row, output) for row in rows)

    check()
    assert isinstance(task, tasks.Task)


# Records.

FILES = ["config.yaml", "result.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_any_record_is_evaluated_or_refused_in_one_line(name, runs_folder):
    short = ["train.max_steps=1", "eval.max_examples=2", "eval.before=false", "wandb.mode=disabled"]
    result = train_run(Run.prepare(load_settings(["model=tiny-roberta", "task=demo/sentiment", *short])))
    folder = runs_folder / "adhoc" / result["identity"]
    good = (folder / name).read_bytes()

    @draws(6)
    @given(st.lists(changes, min_size=1, max_size=2))
    def check(changes):
        content = good
        for change in changes:
            content = change(content)
        (folder / name).write_bytes(content)
        try:
            assert evaluate_command([f"run={folder}"]) in (EXIT_OK, EXIT_FAILED)
        except UserError as error:
            in_one_line(error)

    check()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_times_as_many(monkeypatch):
    """The same tests with more draws, in a process of their own."""
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__, "--timeout=3600"],
        env=os.environ | {"DUAL_LORA_FUZZ": "10"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
