"""How scores are recomputed on resampled rows, so that they can have confidence intervals and paired tests.

A test resamples rows with replacement, or swaps the outputs of two runs, a few thousand times. A measure therefore
takes rows as numbers, plus how often each row occurs: `measure(columns_NC, weights_RN) -> values_R`. A task names the
measure of each of its scores in `declare_scores`; dual_lora/lab/statistics knows no score by name.

    N  rows       R  resamples       C  numbers that stand for one row       K  classes

A new score is `Score(columns, measure)`: a mean over rows (exact match, ROUGE-L) takes `mean`, one of counts (F1, BLEU)
sums these over rows and computes the score from the sums. A measure is a finite number of any rows, whatever a resample
leaves of them; `divide_or_zero` makes 0 of 0/0. One that is not gets no test.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import sacrebleu

from tasks import metrics
from tasks.base import Row

TINY = 1e-10  # variance relative to the mean square below which a column counts as constant

Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]


def get_single_stratum(row: Row) -> str:
    """Return the one stratum of a score that is computed on all rows at once."""
    return "all"


@dataclass(frozen=True)
class Score:
    """How one score of a task follows from judged rows.

    The score is the unweighted mean, over strata, of the measure on each stratum's rows. A row is the unit that is
    resampled and swapped. The measure decides the paired test: McNemar's exact test for a `mean` of 1 (right) and 0
    (wrong) in a single stratum with one seed, otherwise the permutation test. The interval is a bootstrap over rows.

    Attributes:
        columns: the C numbers that stand for one judged row.
        measure: the score of rows given as such numbers.
        stratum: the name of the part of the score a row belongs to; None where it belongs to none.
    """

    columns: Callable[[Row], Sequence[float]]
    measure: Measure
    stratum: Callable[[Row], str | None] = get_single_stratum


# What stands for a row


def mark_correct(row: Row) -> tuple[float]:
    """Return 1 if the row's answer is the gold one, else 0."""
    return (float(row["answer"] == row["gold"]),)


def get_answer_and_gold(row: Row) -> tuple[float, float]:
    """Return a row's answer and gold: class indices or numbers."""
    return row["answer"], row["gold"]


def select_column(name: str) -> Callable[[Row], tuple[float]]:
    """Return a function that takes the number of this name from a row."""
    return lambda row: (row[name],)


@dataclass(frozen=True)
class Bleu:
    """How texts are prepared for BLEU: `words` splits them into words and keeps six references (metrics.score_webnlg);
    `smooth` is sacrebleu's "exp"."""

    words: bool = False
    lowercase: bool = True
    smooth: bool = False

    def columns(self, row: Row) -> tuple[float, ...]:
        (text,), (references,) = metrics.join_lines([row["answer"]], [row["references"]])
        if self.words:
            text, references = metrics.split_words(text), [metrics.split_words(r) for r in references[:6]]
        return count_ngrams(text, tuple(references), self.lowercase)

    def score(self) -> Score:
        """Return corpus BLEU of rows with an `answer` and `references`."""
        return Score(self.columns, functools.partial(bleu, smooth=self.smooth))


# Measures on weighted rows


def mean(columns_NC: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """Return the weighted mean of the rows' one number."""
    return weights_RN @ columns_NC[:, 0] / weights_RN.sum(axis=1)


def count_by_class(columns_NC: np.ndarray, weights_RN: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return counts of each class among correct answers, answers and gold, from (answer, gold): three arrays (R, K)."""
    classes, codes = np.unique(columns_NC, return_inverse=True)
    answer_NK, gold_NK = np.eye(len(classes))[codes.reshape(columns_NC.shape).T]
    return weights_RN @ (answer_NK * gold_NK), weights_RN @ answer_NK, weights_RN @ gold_NK


def matthews(columns_NC: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """Return Matthews correlation of (answer, gold) over any number of classes, R_K of Gorodkin (2004), "Comparing two
    K-category assignments by a K-category correlation coefficient"; 0 where either is constant."""
    right_RK, answers_RK, gold_RK = count_by_class(columns_NC, weights_RN)
    total = weights_RN.sum(axis=1)
    above = right_RK.sum(axis=1) * total - (answers_RK * gold_RK).sum(axis=1)
    spread = [total**2 - (counts**2).sum(axis=1) for counts in (answers_RK, gold_RK)]
    return divide_or_zero(above, np.sqrt(spread[0] * spread[1]))


def macro_f1(columns_NC: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """Return the unweighted mean of the F1 of every class among the answers and the gold of a resample."""
    right_RK, answers_RK, gold_RK = count_by_class(columns_NC, weights_RN)
    seen_RK = answers_RK + gold_RK
    return divide_or_zero(2 * right_RK, seen_RK).sum(axis=1) / (seen_RK > 0).sum(axis=1)


def f1(columns_NC: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """Return F1 of class 1 from (answer, gold), both 0 or 1; 0 where there is no 1."""
    both = columns_NC[:, 0] * columns_NC[:, 1]
    return divide_or_zero(2 * (weights_RN @ both), weights_RN @ columns_NC.sum(axis=1))


def quotient(columns_NC: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """Return the sum of the first number over the sum of the second: a mean over items, several of them in a row."""
    above, below = (weights_RN @ columns_NC).T
    return divide_or_zero(above, below)


def pearson(columns_NC: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """Return the correlation of (answer, gold); 0 where either is constant."""
    x_N, y_N = (columns_NC - columns_NC.mean(axis=0)).T
    sums_R5 = weights_RN @ np.stack([x_N, y_N, x_N * x_N, y_N * y_N, x_N * y_N], axis=1)
    return correlate_from_means(*sums_R5.T / weights_RN.sum(axis=1))


def spearman(columns_NC: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """Return the correlation of the ranks within each resample, equal values sharing their mean rank."""
    x_RN, y_RN = (rank_values(values, weights_RN) for values in columns_NC.T)
    products = (x_RN, y_RN, x_RN * x_RN, y_RN * y_RN, x_RN * y_RN)
    return correlate_from_means(
        *(np.einsum("rn,rn->r", weights_RN, p_RN) / weights_RN.sum(axis=1) for p_RN in products)
    )


def pearson_spearman(columns_NC: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """Return the mean of Pearson's and Spearman's correlation of (answer, gold)."""
    return (pearson(columns_NC, weights_RN) + spearman(columns_NC, weights_RN)) / 2


def correlate_from_means(x: np.ndarray, y: np.ndarray, xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Return correlations from the means of x, y, which are roughly centred, and of their products."""
    spreads = [np.where(v2 - m**2 > TINY * v2, v2 - m**2, 0) for m, v2 in ((x, xx), (y, yy))]
    return divide_or_zero(xy - x * y, np.sqrt(spreads[0] * spreads[1]))


def rank_values(values_N: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """Return each value's mean rank among the weighted values, centred on 0, of shape (R, N)."""
    order = np.argsort(values_N, kind="stable")
    _, starts, places = np.unique(values_N[order], return_index=True, return_inverse=True)
    equal = np.add.reduceat(weights_RN[:, order], starts, axis=1)
    middle = np.cumsum(equal, axis=1) - equal / 2 - weights_RN.sum(axis=1, keepdims=True) / 2
    return middle[:, places[np.argsort(order)]]


def bleu(columns_NC: np.ndarray, weights_RN: np.ndarray, smooth: bool = False) -> np.ndarray:
    """Return corpus BLEU from `count_ngrams`; `smooth` is sacrebleu's "exp" for orders without a match."""
    sums = weights_RN @ columns_NC
    length, closest, matched, total = sums[:, 0], sums[:, 1], sums[:, 2:6], sums[:, 6:]
    if smooth:
        matched = np.where((matched == 0) & (total > 0), 0.5 ** np.cumsum(matched == 0, axis=1), matched)
    scored = (sums[:, 2:6] > 0).any(axis=1) & (matched > 0).all(axis=1)
    logs = np.log(np.where(scored[:, None], matched, 1) / np.where(scored[:, None], total, 1)).mean(axis=1)
    brevity = np.minimum(0, 1 - closest / np.where(scored, length, 1))
    return np.where(scored, np.minimum(np.exp(logs + brevity), 1), 0)


def divide_or_zero(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return above / below, 0 where below is 0."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


@functools.lru_cache(maxsize=2**14)
def count_ngrams(text: str, references: tuple[str, ...], lowercase: bool) -> tuple[float, ...]:
    """Return an output's length, its closest reference's, and matched and all n-grams of orders 1 to 4 (C = 10)."""
    found = get_bleu_scorer(lowercase).sentence_score(text, list(references))
    return found.sys_len, found.ref_len, *found.counts, *found.totals


@functools.cache
def get_bleu_scorer(lowercase: bool) -> sacrebleu.BLEU:
    """Return the scorer of single texts, built once."""
    return sacrebleu.BLEU(lowercase=lowercase, tokenize="13a", effective_order=True)


# The scores of the usual tasks


def declare_classification_scores(classes: int) -> dict[str, Score]:
    """Return how to recompute the scores of `metrics.score_classification` on resampled rows."""
    found = {"accuracy": Score(mark_correct, mean), "matthews": Score(get_answer_and_gold, matthews)}
    return found | ({"f1": Score(get_answer_and_gold, f1)} if classes == 2 else {})


def declare_regression_scores() -> dict[str, Score]:
    """Return how to recompute the scores of `metrics.score_regression` on resampled rows."""
    known = {"pearson": pearson, "spearman": spearman, "pearson_spearman_mean": pearson_spearman}
    return {name: Score(get_answer_and_gold, measure) for name, measure in known.items()}


def restrict_scores(scores: dict[str, Score], prefix: str, belongs: Callable[[Row], bool]) -> dict[str, Score]:
    """Return scores of the rows that belong to one part of the data, under names with a prefix."""

    def stratum(row: Row) -> str | None:
        return "all" if belongs(row) else None

    return {prefix + name: replace(score, stratum=stratum) for name, score in scores.items()}
