"""What every method of conf/method did to the weights, as it is analysed, is what its export changes in them."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.paths import list_choices
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.run import train_run

SHORT = ["model=tiny-roberta", "task=demo/sentiment", "train.max_steps=2", "train.batch_size=4", "train.lr=0.01"]
SHORT += ["train.max_examples=8", "eval.max_examples=4", "eval.before=false", "wandb.mode=disabled"]
ROLES = {"q", "k", "v", "o", "up", "down"}
IDLE = {"none", "head_only"}  # which change no weight of the base
# Four that differ in how dW comes about; the others take a minute of one core together.
USUAL = {"dual_lora", "pissa", "oft", "hira"}
METHODS = [
    pytest.param(name, marks=[] if name in USUAL else pytest.mark.slow)
    for name in sorted(set(list_choices("method")) - IDLE)
]


@pytest.mark.parametrize("method", METHODS)
def test_the_analysed_update_is_exported_minus_original(method, runs_folder, tmp_path, capsys):
    run = Run.prepare(load_settings([*SHORT, f"method={method}"]))
    train_run(run)
    file, folder = tmp_path / "updates.safetensors", tmp_path / "export"
    for words in (f"save_updates={file}", f"export={folder}"):
        assert evaluate_command([f"run={run.record.folder}", words]) == 0
    original = load_file(paths.BUNDLED / "tiny-roberta/model.safetensors")
    exported, updates = load_file(folder / "model.safetensors"), load_file(file)
    assert sum(".layer." in name and dW.ndim == 2 for name, dW in updates.items()) == len(ROLES) * 3
    for module, dW in updates.items():
        weight = module if module in original else f"{module}.weight"  # a bias stands under its own name
        before = original[weight].astype(np.float64)
        difference = exported[weight] - before
        size, rounding = np.linalg.norm(difference), 1e-7 * np.linalg.norm(before)
        assert size > 100 * rounding, f"{module}: next to nothing was trained"
        difference = difference.T if module.endswith("embeddings") else difference
        assert np.linalg.norm(dW - difference) < 1e-4 * size + rounding, module
