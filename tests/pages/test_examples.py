"""The scripts of examples/, executed as their first lines say, made short."""

import csv
import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import forked
from tests.support.places import ROOT

LLAMA = str(ROOT / "dual_lora/lab/model/bundled/tiny-llama")
MODES = {"lora seed=0", "lora seed=1", "dual_lora seed=0", "dual_lora seed=1"}
MEANS = {f"{method}, mean ± SD of 2 seeds" for method in ("lora", "dual_lora")}


def test_a_model_is_adapted_loaded_and_merged(tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"The Blue Fig serves dish number {n} in the old town.\n\n" for n in range(40)))
    out = tmp_path / "out"
    done = forked.run("examples/adapt_your_model.py", LLAMA, str(texts), str(out), "--steps", "15")
    assert done.returncode == 0, done.stderr
    (losses,) = [line for line in done.stdout.splitlines() if line.startswith("loss on held-out lines")]
    before, after = (float(word) for word in losses.split() if word.replace(".", "").isdigit())
    assert after < 0.9 * before
    ids = AutoTokenizer.from_pretrained(out / "merged")("The Blue Fig", return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(LLAMA)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(LLAMA), out / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    with torch.no_grad():
        wanted = adapted(ids).logits
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        assert (base(ids).logits - wanted).abs().max() > 0.1


def test_too_little_text_is_said_in_one_line(tmp_path):
    (tmp_path / "texts.txt").write_text("one line\n")
    done = forked.run("examples/adapt_your_model.py", LLAMA, str(tmp_path / "texts.txt"), str(tmp_path / "out"))
    assert done.returncode == 2 and "needs at least two lines of text" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("own", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_csv_is_classified_and_reported(own, tmp_path, runs_folder):
    words = ["train.max_steps=2", "eval.before=false", "wandb.mode=disabled"]
    if own:
        with (tmp_path / "train.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("review", "label"), *((f"text {n}", "ab"[n % 2]) for n in range(40))])
        words = [str(tmp_path), "tiny-deberta", "task.options.text=review", *words]
    else:
        words = [str(ROOT / "examples/reviews"), "tiny-roberta", *words]
    done = subprocess.run(
        ["sh", str(ROOT / "examples/classify_your_csv.sh"), *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *_, table, report = done.stdout.rstrip().split("\n\n")
    assert {line.split("  ")[0] for line in table.splitlines()[2:]} == MODES | MEANS
    folder = runs_folder / "classify_your_csv" / "report"
    assert report == f"report: {folder}"
    rows = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith(("| LoRA", "| Dual"))]
    assert len(rows) == 2 and all("± " in row and "(2)" in row for row in rows)
