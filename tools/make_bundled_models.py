"""Pretrain the bundled tiny models, each the architecture of a real family at a width of 128.

    python -m tools.make_bundled_models [names]

The text is `tasks.demo.iterate_corpus`. Decoders learn to predict the next token, encoders the masked 15 %. The
tokenizers are byte-level BPE, so no text has unknown tokens; the special tokens and their order are each family's own.
Weights are stored in float16 to be small and load in float32. Each folder's README row is written from what its run
measured.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    get_cosine_schedule_with_warmup,
)

from tasks import demo

HERE = Path(__file__).resolve().parents[1] / "dual_lora" / "lab" / "model" / "bundled"
VOCABULARY = 1280
BLOCK = 96  # tokens a decoder sees at once
HELD_OUT = 1000  # documents
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.06,
}
ENCODER = {**SIZES, "intermediate_size": 512, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
READS = {
    "encoder": {"write_review_text": 4, "write_facts": 1},
    "decoder": {
        "write_review_text": 1,
        "write_restaurant_text": 3,
        "write_facts": 2,
        "write_answered_question": 6,
        "write_lookup": 3,
    },
}
README = """# Bundled models

Trained weights in the architectures of four families, small enough to try everything without a download. They know
only the generated world of `tasks/demo.py`. `python -m tools.make_bundled_models` makes them and writes this file.
Losses are on held-out text, in nats a token; a uniform guess has {uniform:.2f}.

| model | objective | parameters | steps | folder, MB | loss, untrained | loss | perplexity |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Family:
    """An architecture, its special tokens in the order of their ids, and how they frame a text or a pair of texts."""

    config: PreTrainedConfig
    special: dict[str, str]
    single: str
    pair: str
    masked: bool
    batch: int  # a decoder's blocks or an encoder's documents
    steps: int
    lr: float


FAMILIES = {
    "tiny-gpt2": Family(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=128, n_layer=3, n_head=4, n_positions=256, initializer_range=0.06,
            bos_token_id=0, eos_token_id=0, pad_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
        {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"},
        single="$A", pair="$A $B:1", masked=False, batch=24, steps=2500, lr=3e-3,
    ),
    "tiny-llama": Family(
        LlamaConfig(
            **SIZES, num_key_value_heads=2, intermediate_size=344, max_position_embeddings=256, bos_token_id=0,
            eos_token_id=1, pad_token_id=2,
        ),
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        single="<s> $A", pair="<s> $A $B:1", masked=False, batch=24, steps=2500, lr=3e-3,
    ),
    "tiny-roberta": Family(
        RobertaConfig(
            **ENCODER, max_position_embeddings=258, type_vocab_size=1, layer_norm_eps=1e-5, bos_token_id=0,
            pad_token_id=1, eos_token_id=2,
        ),
        {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"},
        single="<s> $A </s>", pair="<s> $A </s> </s> $B:1 </s>", masked=True, batch=64, steps=2000, lr=1e-3,
    ),
    "tiny-deberta": Family(
        DebertaV2Config(
            **ENCODER, max_position_embeddings=256, type_vocab_size=0, relative_attention=True, position_buckets=32,
            pos_att_type="p2c|c2p", position_biased_input=False, share_att_key=True, norm_rel_ebd="layer_norm",
            conv_kernel_size=3, conv_act="gelu", legacy=False, pad_token_id=0,
        ),
        {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk", "mask")},
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]", masked=True, batch=64, steps=2000, lr=1e-3,
    ),
}  # fmt: skip


def list_task_texts() -> list[str]:
    """Return what the demo tasks train on, which the tokenizers (and not the models) see."""
    rows = [row for subset in demo.SUBSETS for row in demo.task(subset).split("train").rows]
    return [row.get("text") or row["prompt"] + row["target"] for row in rows]


def train_tokenizer(family: Family, texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with the family's special tokens first."""
    special = list(family.special.values())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=family.single, pair=family.pair, special_tokens=[(token, i) for i, token in enumerate(special)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=256, **family.special)


def encode_examples(tokenizer: PreTrainedTokenizerFast, family: Family, documents: list[str]) -> list[dict]:
    """Return an encoder's documents one by one; a decoder's joined by the end-of-text token and cut into equal
    blocks."""
    ids = tokenizer(documents)["input_ids"]
    if not family.masked:
        stream = [token for document in ids for token in (*document, tokenizer.eos_token_id)]
        ids = [stream[i : i + BLOCK] for i in range(0, len(stream) - BLOCK, BLOCK)]
    return [{"input_ids": example} for example in ids]


@torch.no_grad()
def measure_loss(model: PreTrainedModel, collate: DataCollatorForLanguageModeling, rows: list[dict]) -> float:
    """Return the mean loss in nats a token, with the same masks at every call."""
    torch.manual_seed(0)
    batches = [collate(rows[i : i + 32]) for i in range(0, len(rows), 32)]
    model.eval()
    losses = [(model(**batch).loss.item(), (batch["labels"] != -100).sum().item()) for batch in batches]
    model.train()
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def train_model(
    model: PreTrainedModel, collate: DataCollatorForLanguageModeling, rows: list[dict], family: Family
) -> None:
    """Train for the family's number of steps, on the rows in a new order at each pass."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=family.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, family.steps // 10, family.steps)
    order: list[int] = []
    for step in range(family.steps):
        if len(order) < family.batch:
            order = torch.randperm(len(rows)).tolist()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**collate([rows[order.pop()] for _ in range(family.batch)])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"  step {step}: loss {loss.item():.3f}", flush=True)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights in float16, with a configuration that asks for float32."""
    model.half().save_pretrained(folder)
    model.config.dtype = "float32"
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_model(name: str) -> None:
    """Pretrain one model into its folder, with what was measured in pretraining.json."""
    family, folder = FAMILIES[name], HERE / name
    documents = list(demo.iterate_corpus(READS["encoder" if family.masked else "decoder"]))
    tokenizer = train_tokenizer(family, documents + list_task_texts())
    held_out = encode_examples(tokenizer, family, documents[:HELD_OUT])
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=family.masked, mlm_probability=0.15)
    torch.manual_seed(0)
    model = (AutoModelForMaskedLM if family.masked else AutoModelForCausalLM).from_config(family.config)
    untrained = measure_loss(model, collate, held_out)
    print(f"{name}: {model.num_parameters():,} parameters, untrained loss {untrained:.3f}", flush=True)
    train_model(model, collate, encode_examples(tokenizer, family, documents[HELD_OUT:]), family)
    save_model(model, tokenizer, folder)
    facts = {
        "objective": "masked tokens" if family.masked else "next token",
        "parameters": model.num_parameters(),
        "steps": family.steps,
        "untrained_loss": round(untrained, 3),
        "loss": round(measure_loss(model.float(), collate, held_out), 3),
    }
    (folder / "pretraining.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")


def format_readme_row(folder: Path) -> str:
    """Return a model's row of the README's table."""
    facts = json.loads((folder / "pretraining.json").read_text("utf-8"))
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    measured = f"{facts['untrained_loss']:.2f} | {facts['loss']:.2f} | {math.exp(facts['loss']):.2f}"
    columns = f"{facts['objective']} | {facts['parameters']:,} | {facts['steps']} | {size:.2f} | {measured}"
    return f"| {folder.name} | {columns} |\n"


def format_readme() -> str:
    """Return the README of the folder, with a row for each model that is there."""
    made = [HERE / name for name in FAMILIES if (HERE / name / "pretraining.json").exists()]
    return README.format(uniform=math.log(VOCABULARY)) + "".join(map(format_readme_row, made))


if __name__ == "__main__":
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    for chosen in sys.argv[1:] or FAMILIES:
        make_model(chosen)
    (HERE / "README.md").write_text(format_readme(), "utf-8")
