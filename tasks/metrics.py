"""Metrics shared by tasks, each from the library the field uses. All are fractions; none is in percent."""

from collections.abc import Sequence

from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def classification(answers: Sequence[int], gold: Sequence[int]) -> dict[str, float]:
    """Return accuracy and Matthews correlation, and F1 of class 1 where there are two classes."""
    scores = {"accuracy": accuracy_score(gold, answers), "matthews": matthews_corrcoef(gold, answers)}
    if set(gold) | set(answers) <= {0, 1}:
        scores["f1"] = f1_score(gold, answers, zero_division=0.0)
    return {key: float(value) for key, value in scores.items()}


def regression(answers: Sequence[float], gold: Sequence[float]) -> dict[str, float]:
    """Return Pearson and Spearman correlation and their mean; 0 where the answers are all the same."""
    if len(set(answers)) < 2 or len(set(gold)) < 2:
        return {"pearson": 0.0, "spearman": 0.0, "pearson_spearman_mean": 0.0}
    pearson, spearman = float(pearsonr(answers, gold)[0]), float(spearmanr(answers, gold)[0])
    return {"pearson": pearson, "spearman": spearman, "pearson_spearman_mean": (pearson + spearman) / 2}
