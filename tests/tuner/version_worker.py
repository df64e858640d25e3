"""`python -m tests.tuner.version_worker write|read FOLDER`: save an adapter and its logits, or load and compare them.

Run with one release of PEFT on the path to write and with another to read. Prints the release.
"""

import sys
from pathlib import Path

import peft
import torch
from peft import PeftModel, get_peft_model

from dual_lora import DualLoraConfig, set_update_scale
from dual_lora.tuner.warmup import list_factors
from tests.tuner.tiny_llama import llama

IDS = torch.arange(1, 25).reshape(2, 12)
FIELDS = {
    "r": 6,
    "magnitude_ratio": 0.3,
    "init_std": 0.2,
    "scale_warmup_steps": 50,
    "target_modules": ["q_proj", "v_proj", "embed_tokens"],
    "rank_pattern": {"v_proj": 4},
    "modules_to_save": ["lm_head"],
}


def write(folder: Path, base) -> None:
    model = get_peft_model(base, DualLoraConfig(**FIELDS)).eval()
    set_update_scale(model, 0.6, ramp=True)
    model.save_pretrained(folder)
    torch.save(model(input_ids=IDS).logits.detach(), folder / "logits.pt")


def read(folder: Path, base) -> None:
    model = PeftModel.from_pretrained(base, folder).eval()
    assert {int(f.step) for f in list_factors(model)} == {30}
    assert torch.equal(model(input_ids=IDS).logits, torch.load(folder / "logits.pt"))
    config = model.peft_config["default"]
    assert all(getattr(config, k) == (set(v) if k == "target_modules" else v) for k, v in FIELDS.items())


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]), llama().eval())
    print(peft.__version__)
