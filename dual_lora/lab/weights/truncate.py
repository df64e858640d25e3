"""A finished run scored again with each of its weight updates cut to rank k = 0, 1, 2, 4, ... up to their full rank.

For an adapter, every adapted weight becomes W0 + dW_k. For full tuning, every weight with a role does; what else
trained (embeddings, norms, biases, and the head under every method) stays as trained. The curve is written into the
run's folder, so that a report needs neither the weights nor the data.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from dual_lora.analysis.truncation import Decomposition, list_cut_ranks
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError, require
from dual_lora.lab.evaluate.evaluate import evaluate_splits
from dual_lora.lab.evaluate.trained import load_recorded_splits
from dual_lora.lab.model.load import move_to_device
from dual_lora.lab.model.merge import merge_and_unload
from dual_lora.lab.record.record import TRUNCATION_FILE, Record
from dual_lora.lab.system.libraries import silence_libraries
from dual_lora.lab.weights.updates import NAME_ROLES, Update, list_updates, load_trained_and_base, orient_weight


@dataclass(frozen=True)
class CutWeight:
    """One changed weight: the module's name, the rows that changed, W0 (out x in) and dW taken apart."""

    module: str
    block: slice
    original: Tensor
    change: Decomposition

    @classmethod
    def take_apart(cls, update: Update) -> "CutWeight":
        """Return a changed weight with its singular value decomposition."""
        change = Decomposition.compute(update.get_change())
        return cls(update.module, update.block, update.get_weight().clone(), change)


def truncate_run(settings: Settings, record: Record) -> None:
    """Score a finished run at every rank and write the scores into its folder.

    Raises:
        UserError: the run's weights or rows are not there, its weights are not in float32, nothing was changed, or the
            outputs of a cut model are NaN or Inf.
    """
    silence_libraries()
    where = f"run={record.format_path()}"
    stored = record.require_result(where)
    dtype = settings.model.dtype
    require(dtype == "float32", f"{where}: model.dtype={dtype} rounds small updates away; only float32 can be cut")
    task = load_task(settings)
    splits = load_recorded_splits(settings, record, stored, task)
    trained, base, tokenizer = load_trained_and_base(settings, record)
    weights = [CutWeight.take_apart(update) for update in list_updates(trained, base, settings)]
    require(bool(weights), f"{where}: changed no weight that has a rank; {NAME_ROLES}")
    model = merge_and_unload(trained) if isinstance(trained, PeftModel) else trained
    move_to_device(model)
    ranks = list_cut_ranks(max(weight.change.numerical_rank for weight in weights))
    scores = []
    for rank in tqdm(ranks, desc="ranks", leave=False):
        write_cut_weights(model, weights, rank)
        scores.append(score_or_none(lambda: evaluate_splits(model, tokenizer, task, splits, settings), task.metric))
    content = {
        "run": record.name,
        "metric": task.metric,
        "recorded": stored["metrics"][task.metric],
        "weights": len(weights),
        "ranks": ranks,
        "scores": scores,
        "kept": list(iterate_kept_shares(weights, ranks)),
    }
    record.write_sealed(TRUNCATION_FILE, content)


@torch.no_grad()
def write_cut_weights(model: nn.Module, weights: list[CutWeight], rank: int) -> None:
    """Set every changed weight of a plain model to W0 + dW_k, k = rank."""
    modules = dict(model.named_modules())
    for weight in weights:
        layer = modules[weight.module]
        matrix = orient_weight(layer, layer.weight).clone()
        matrix[weight.block] = (weight.original + weight.change.truncate(rank)).to(matrix.device)
        turned = matrix.T if isinstance(layer, Conv1D | nn.Embedding) else matrix
        layer.weight.copy_(turned.reshape(layer.weight.shape))


def score_or_none(evaluate, metric: str) -> float | None:
    """Return a score; None where the outputs have none, such as the correlation of equal numbers.

    Raises:
        UserError: what else keeps the outputs from being scored, such as NaN among them.
    """
    try:
        return evaluate()[0][metric]
    except UserError as error:
        if not error.details.get("undefined"):
            raise
        return None


def iterate_kept_shares(weights: list[CutWeight], ranks: list[int]) -> Iterator[float]:
    """Yield, for each rank, the mean over weights of the share of ||dW||^2 that the cut keeps."""
    for rank in ranks:
        yield sum(weight.change.compute_kept_share(rank) for weight in weights) / len(weights)
