"""Adapt a causal language model to your own text with the Trainer, then load the adapter and merge it.

python examples/adapt_your_model.py MODEL TEXTS OUT [--steps 100] [--lr 2e-3]

MODEL is a folder or a hub name, TEXTS a file with one text a line. A tenth of the lines is held out. OUT receives
`adapter/`, for PEFT, and `merged/`, a model that plain transformers loads.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from dual_lora import DualLoraConfig  # registers the method with PEFT

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("texts", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--lr", type=float, default=2e-3)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
texts = [line for line in options.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
if len(texts) < 2:
    parser.error(f"{options.texts}: needs at least two lines of text")
rows = Dataset.from_dict(dict(tokenizer(texts, truncation=True, max_length=256)))
rows = rows.train_test_split(test_size=0.1, seed=0)

# Train.
base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
model = get_peft_model(base, DualLoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
model.print_trainable_parameters()
trainer = Trainer(
    model,
    TrainingArguments(
        str(options.out / "checkpoints"),
        max_steps=options.steps,
        learning_rate=options.lr,
        warmup_steps=0.06,
        per_device_train_batch_size=8,
        save_strategy="no",
        report_to="none",
    ),
    DataCollatorForLanguageModeling(tokenizer, mlm=False),
    train_dataset=rows["train"],
    eval_dataset=rows["test"],
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"loss on held-out lines: {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")
model.save_pretrained(options.out / "adapter")

# Load the adapter onto the base model, and merge.
base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
loaded = PeftModel.from_pretrained(base, options.out / "adapter").eval()
probe = tokenizer(texts[0], truncation=True, max_length=256, return_tensors="pt")["input_ids"]
with torch.no_grad():
    wanted = loaded(probe).logits
    merged = loaded.merge_and_unload()
    difference = (merged(probe).logits - wanted).abs().max()
print(f"largest difference of a logit, merged and not: {difference:.1e}")
merged.save_pretrained(options.out / "merged")
tokenizer.save_pretrained(options.out / "merged")
