"""The same loss curve from every kernel: 20 steps of the bundled tiny-llama, kept as a golden file."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import dual_lora
from dual_lora import DualLoraConfig
from tests.support import places

GOLDEN = places.GOLDEN / "kernels.json"
MODEL = Path(dual_lora.__file__).parent / "lab" / "model" / "bundled" / "tiny-llama"
STEPS = 20
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def losses(kernel: str, steps: int = STEPS) -> list[float]:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    config = DualLoraConfig(r=8, target_modules=["q_proj", "v_proj"], scale_warmup_steps=5, kernel=kernel)
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(5, 200, (STEPS, 2, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for batch in ids[:steps]:
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    ("kernel", "steps"),  # Triton's interpreter takes two seconds a step
    [("eager", STEPS), ("recompute", STEPS), ("auto", STEPS), pytest.param("triton", 8, marks=needs_triton)],
)
def test_every_step_has_the_golden_loss(kernel, steps):
    """DUAL_LORA_GOLDEN=write writes the file anew from the readable map."""
    if kernel == "eager" and os.environ.get("DUAL_LORA_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(losses("eager"), indent=1) + "\n")
    assert losses(kernel, steps) == pytest.approx(json.loads(GOLDEN.read_text())[:steps], rel=1e-5)
