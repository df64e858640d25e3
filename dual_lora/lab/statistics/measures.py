"""Scores as functions of weighted examples, and which score of which task is one of them."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import sacrebleu

from tasks import Task, metrics
from tasks.base import Row

TOLERANCE = 1e-10
Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Rule:
    """How a metric is computed again: a row's stratum (None: not in it), its C numbers, and a measure on these.

    The metric is the unweighted mean of the measure over the strata.
    """

    stratum: Callable[[Row], str | None]
    columns: Callable[[Row], Sequence[float]]
    measure: Measure


def weigh_mean(columns_NC: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """Return the weighted mean of a column."""
    return weights_RN @ columns_NC[:, 0] / weights_RN.sum(axis=1)


def weigh_matthews(columns_NC: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """Return Matthews correlation of (answer, gold) over any number of classes; 0 where either is constant."""
    classes, codes = np.unique(columns_NC, return_inverse=True)
    answer_N, gold_N = codes.reshape(columns_NC.shape).T
    each = np.eye(len(classes) ** 2)[answer_N * len(classes) + gold_N]
    table_RKK = (weights_RN @ each).reshape(-1, len(classes), len(classes))
    answers_RK, gold_RK, total = table_RKK.sum(axis=2), table_RKK.sum(axis=1), weights_RN.sum(axis=1)
    above = np.trace(table_RKK, axis1=1, axis2=2) * total - (answers_RK * gold_RK).sum(axis=1)
    spread = [total**2 - (counts**2).sum(axis=1) for counts in (answers_RK, gold_RK)]
    return divide_or_zero(above, np.sqrt(spread[0] * spread[1]))


def weigh_f1(columns_NC: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """Return F1 of class 1 from (answer, gold), both 0 or 1; 0 where there is no 1."""
    both = columns_NC[:, 0] * columns_NC[:, 1]
    return divide_or_zero(2 * (weights_RN @ both), weights_RN @ columns_NC.sum(axis=1))


def weigh_pearson(columns_NC: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """Return the correlation of (answer, gold); 0 where either is constant."""
    x_N, y_N = (columns_NC - columns_NC.mean(axis=0)).T
    sums_R5 = weights_RN @ np.stack([x_N, y_N, x_N * x_N, y_N * y_N, x_N * y_N], axis=1)
    return correlate_moments(*sums_R5.T / weights_RN.sum(axis=1))


def weigh_spearman(columns_NC: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """Return the correlation of the ranks within each resample, equal values sharing their mean rank."""
    x_RN, y_RN = (rank_weighted(values, weights_RN) for values in columns_NC.T)
    products = (x_RN, y_RN, x_RN * x_RN, y_RN * y_RN, x_RN * y_RN)
    return correlate_moments(*(np.einsum("rn,rn->r", weights_RN, p_RN) / weights_RN.sum(axis=1) for p_RN in products))


def weigh_pearson_spearman(columns_NC: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    return (weigh_pearson(columns_NC, weights_RN) + weigh_spearman(columns_NC, weights_RN)) / 2


def correlate_moments(x: np.ndarray, y: np.ndarray, xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Return correlations from the means of x, y, which are roughly centred, and of their products."""
    spreads = [np.where(v2 - m**2 > TOLERANCE * v2, v2 - m**2, 0) for m, v2 in ((x, xx), (y, yy))]
    return divide_or_zero(xy - x * y, np.sqrt(spreads[0] * spreads[1]))


def rank_weighted(values_N: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """Return each value's mean rank among the weighted values, counted from their middle, of shape (R, N)."""
    order = np.argsort(values_N, kind="stable")
    _, starts, places = np.unique(values_N[order], return_index=True, return_inverse=True)
    equal = np.add.reduceat(weights_RN[:, order], starts, axis=1)
    middle = np.cumsum(equal, axis=1) - equal / 2 - weights_RN.sum(axis=1, keepdims=True) / 2
    return middle[:, places[np.argsort(order)]]


def weigh_bleu(columns_NC: np.ndarray, weights_RN: np.ndarray, smooth: bool = False) -> np.ndarray:
    """Return corpus BLEU from `ngram_counts`; `smooth` is sacrebleu's "exp" for orders without a match."""
    sums = weights_RN @ columns_NC
    length, closest, right, total = sums[:, 0], sums[:, 1], sums[:, 2:6], sums[:, 6:]
    if smooth:
        right = np.where((right == 0) & (total > 0), 0.5 ** np.cumsum(right == 0, axis=1), right)
    scored = (sums[:, 2:6] > 0).any(axis=1) & (right > 0).all(axis=1)
    logs = np.log(np.where(scored[:, None], right, 1) / np.where(scored[:, None], total, 1)).mean(axis=1)
    brevity = np.minimum(0, 1 - closest / np.where(scored, length, 1))
    return np.where(scored, np.minimum(np.exp(logs + brevity), 1), 0)


def divide_or_zero(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return above / below, 0 where below is 0."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


MEASURES: dict[str, dict[str, Measure]] = {
    "classification": {"accuracy": weigh_mean, "matthews": weigh_matthews, "f1": weigh_f1},
    "regression": {
        "pearson": weigh_pearson,
        "spearman": weigh_spearman,
        "pearson_spearman_mean": weigh_pearson_spearman,
    },
}


@dataclass(frozen=True)
class BleuRule:
    """What a task does to its texts before BLEU: `words` splits them and keeps six references (metrics.webnlg)."""

    words: bool = False
    lowercase: bool = True
    smooth: bool = False

    def count_columns(self, row: Row) -> tuple[float, ...]:
        (text,), (references,) = metrics.one_line([row["answer"]], [row["references"]])
        if self.words:
            text, references = metrics.split_words(text), [metrics.split_words(r) for r in references[:6]]
        return count_ngrams(text, tuple(references), self.lowercase)


BLEUS = {
    "e2e": BleuRule(),
    "webnlg": BleuRule(words=True),
    "dart": BleuRule(words=True),
    "demo/restaurants": BleuRule(lowercase=False, smooth=True),
}


@functools.lru_cache(maxsize=2**14)
def count_ngrams(text: str, references: tuple[str, ...], lowercase: bool) -> tuple[float, ...]:
    """Return an output's length, its closest reference's, and matched and all n-grams of orders 1 to 4 (C = 10)."""
    found = build_bleu_scorer(lowercase).sentence_score(text, list(references))
    return found.sys_len, found.ref_len, *found.counts, *found.totals


@functools.cache
def build_bleu_scorer(lowercase: bool) -> sacrebleu.BLEU:
    return sacrebleu.BLEU(lowercase=lowercase, tokenize="13a", effective_order=True)


def find_rule(task: Task, metric: str, example: Row) -> Rule | None:
    """Return how a metric is computed on resamples, None where it is not; `example` is any row, for its columns."""
    if task.form == "generation":
        return find_bleu_rule(task, metric) or find_share_rule(task, metric, example)
    name = metric.removeprefix("mismatched_")
    measure = MEASURES[task.form].get(name)
    if measure is None or (measure is weigh_f1 and len(task.labels) > 2):
        return None
    columns = mark_correct if measure is weigh_mean else (lambda row: (row["answer"], row["gold"]))
    return Rule(lambda row: name_stratum(row["split"].endswith("mismatched"), name != metric), columns, measure)


def find_bleu_rule(task: Task, metric: str) -> Rule | None:
    """Return the rule of BLEU, or of one group's ("seen_BLEU")."""
    known, (group, _, name) = BLEUS.get(task.name), metric.rpartition("_")
    if not known or name.lower() != "bleu":
        return None
    measure = functools.partial(weigh_bleu, smooth=known.smooth)
    return Rule(lambda row: name_stratum(group, row.get("group") if group else ""), known.count_columns, measure)


def find_share_rule(task: Task, metric: str, example: Row) -> Rule | None:
    """Return the rule of a mean of per-example scores, over one split or as an unweighted mean over splits."""
    if metric == "accuracy":
        return Rule(lambda row: "all", mark_correct, weigh_mean)
    kind = next((k for k in ("lenient_", "likelihood_") if metric.startswith(k)), "")
    empty = metric.startswith(f"{kind}unanswered_")
    split = metric.removeprefix(kind).removeprefix("unanswered_")
    column = f"{kind}answer" if empty else f"{kind}score"
    if column not in example or split not in (*task.eval_splits, "average"):
        return None
    columns = (lambda row: (not row[column],)) if empty else (lambda row: (row[column],))
    return Rule(lambda row: row["split"] if split in ("average", row["split"]) else None, columns, weigh_mean)


def mark_correct(row: Row) -> tuple[float]:
    return (float(row["answer"] == row["gold"]),)


def name_stratum(one: object, other: object) -> str | None:
    """Return the name of the only stratum where both are equal."""
    return "all" if one == other else None
