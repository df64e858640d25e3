"""Packing: the examples of a batch share rows instead of each being padded to the longest.

A step sees the same examples with the same loss as without, in fewer rows of at most `task.max_length` tokens. Where
an example starts, positions start at 0, from which transformers derives a mask without attention between examples
(block-diagonal for `sdpa` and `eager`, variable lengths for flash attention). Padding is one more such block.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dual_lora.lab.errors import require
from dual_lora.lab.model.encode import IGNORED_LABEL
from dual_lora.lab.model.load import agree_up_to_rounding, is_sharded, switch_mode, unwrap_adapter

PROBE_LENGTHS = (5, 4)  # tokens of the two texts on which `check_packing` tries a model


def assign_rows(lengths: list[int], limit: int) -> list[list[int]]:
    """Return which examples share a row of at most `limit` tokens: the longest first, each into the first row that has
    room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((i for i, free in enumerate(room) if free >= lengths[number]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(limit)
        rows[place].append(number)
        room[place] -= lengths[number]
    return rows


@dataclass
class PackingCollator:
    """Makes a packed batch of encoded examples: input_ids, labels, position_ids and attention_mask, rows x width. Other
    columns become one tensor each, in the order of the examples.

    pad: the padding token. limit: maximum tokens of a row.

    The first token of an example has no loss: the token before it is another example's. `attention_mask` is 0 on
    padding, for counting tokens; the model must not be given it.
    """

    pad: int
    limit: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = [len(example["input_ids"]) for example in examples]
        rows = assign_rows(lengths, self.limit)
        width = max(sum(lengths[number] for number in row) for row in rows)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": [], "attention_mask": []}
        for row in rows:
            parts = [examples[number] for number in row]
            rest = width - sum(lengths[number] for number in row)
            ids = [token for part in parts for token in part["input_ids"]]
            labels = [label for part in parts for label in (IGNORED_LABEL, *part["labels"][1:])]
            batch["input_ids"].append(ids + [self.pad] * rest)
            batch["labels"].append(labels + [IGNORED_LABEL] * rest)
            batch["position_ids"].append([i for number in row for i in range(lengths[number])] + list(range(rest)))
            batch["attention_mask"].append([1] * len(ids) + [0] * rest)
        other = {key: [example[key] for example in examples] for key in examples[0].keys() - batch.keys()}
        return {key: torch.tensor(value) for key, value in {**batch, **other}.items()}


def unmask_packed_batch(inputs: dict[str, Any]) -> None:
    """Make a packed batch one that transformers recognizes: without a mask, and without a cache."""
    del inputs["attention_mask"]
    inputs["use_cache"] = False


@torch.no_grad()
def check_packing(model: torch.nn.Module) -> None:
    """Refuse a model whose packed examples attend to each other or get other positions than if run separately, tried on
    two short texts. A sharded model is not tried.

    Raises:
        UserError: with the model's class.
    """
    if is_sharded(model):
        return
    ids = torch.arange(2, 2 + sum(PROBE_LENGTHS), device=model.device)
    texts = ids.split(PROBE_LENGTHS)
    inputs = {"position_ids": torch.cat([torch.arange(len(text), device=ids.device) for text in texts])[None]}
    with switch_mode(model, training=False):
        packed = model(input_ids=ids[None], **inputs, use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=text[None], use_cache=False).logits[0] for text in texts])
    kind = type(unwrap_adapter(model)).__name__
    independent = agree_up_to_rounding(packed, alone, model)
    require(independent, f"train.packing=true: {kind} does not keep packed examples apart; drop it")
