"""Resamples of examples and seeds, and tests by swapping the outputs of two methods."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from statsmodels.stats.contingency_tables import mcnemar

from dual_lora.lab.statistics.pairing import UnscorableRows, translate_score_errors
from tasks.base import Row
from tasks.measures import TINY, Measure, Score, mean

BLOCK = 250  # resamples drawn at once, which bounds memory


class UndefinedMeasure(ValueError):
    """A measure that is no finite number on some weighted rows, with what it gives."""


@dataclass(frozen=True)
class Stratum:
    """The outputs of all runs on examples that are resampled together, `outputs_MPGC`, and how many each is, `sizes_G`.

    pairs: the pairs of runs a seed, P / S. Their mean is the seed's difference.
    """

    outputs: np.ndarray
    sizes: np.ndarray
    pairs: int = 1


def build_strata(runs: list[list[list[Row]]], score: Score, metric: str, pairs: int = 1) -> list[Stratum]:
    """Return the outputs of each stratum as numbers. runs: [side][pair][example]; pairs: how many of them a seed has.

    Raises:
        ValueError: no example belongs to the metric.
        UnscorableRows: what the metric is made of is missing in one.
    """
    positions: dict[str, list[int]] = {}
    with translate_score_errors(f"{metric}: cannot be read from the predictions of a run"):
        try:
            for position, row in enumerate(runs[0][0]):
                if (name := score.stratum(row)) is not None:
                    positions.setdefault(name, []).append(position)
            outputs = np.array([[[score.columns(row) for row in rows] for rows in side] for side in runs], dtype=float)
        except KeyError as missing:
            raise UnscorableRows(f"{metric}: the predictions of a run have no {missing}") from missing
    if not positions:
        raise ValueError(f"{metric}: no prediction belongs to it")
    return [group_equal_examples(outputs[:, :, chosen], pairs) for chosen in positions.values()]


def group_equal_examples(outputs_MPNC: np.ndarray, pairs: int = 1) -> Stratum:
    """Return equal examples as one, in the order of their first, so that no name of a method or run decides it."""
    flat = np.moveaxis(outputs_MPNC, 2, 0).reshape(outputs_MPNC.shape[2], -1)
    _, first, sizes = np.unique(flat, axis=0, return_index=True, return_counts=True)
    order = np.argsort(first)
    return Stratum(outputs_MPNC[:, :, first[order]], sizes[order].astype(float), pairs)


def compute_measure(measure: Measure, outputs_GC: np.ndarray, weights_RG: np.ndarray) -> np.ndarray:
    """Return a measure of one run on weighted examples, of shape (R,).

    Raises:
        UndefinedMeasure: it fails, or gives NaN or Inf: no test holds where some resamples do not count.
    """
    try:
        with np.errstate(divide="ignore", invalid="ignore"):
            values_R = measure(outputs_GC, weights_RG)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UndefinedMeasure(f"fails ({error!r})") from error
    if not np.isfinite(values_R).all():
        raise UndefinedMeasure("is NaN or infinite")
    return values_R


def subtract_measures(measure: Measure, stratum: Stratum, weights_RG: np.ndarray) -> np.ndarray:
    """Return each seed's ours - theirs on weighted examples, of shape (R, S).

    Raises:
        UndefinedMeasure: as `compute_measure`.
    """
    sides = [[compute_measure(measure, run, weights_RG) for run in side] for side in stratum.outputs]
    found_RP = np.subtract(*(np.stack(side, axis=1) for side in sides))
    return found_RP.reshape(len(found_RP), -1, stratum.pairs).mean(axis=2)


def bootstrap_difference(
    strata: list[Stratum], measure: Measure, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Return the difference on R draws of examples and of seeds.

    Raises:
        UndefinedMeasure: as `compute_measure`.
    """
    seeds, found = strata[0].outputs.shape[1] // strata[0].pairs, []
    for count in iterate_blocks(resamples):
        drawn = [rng.multinomial(int(s.sizes.sum()), s.sizes / s.sizes.sum(), size=count) for s in strata]
        parts = [subtract_measures(measure, s, w.astype(float)) for s, w in zip(strata, drawn, strict=True)]
        often_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)
        found.append((np.mean(parts, axis=0) * often_RS).sum(axis=1) / seeds)
    return np.concatenate(found)


def compute_permutation_p(
    strata: list[Stratum], measure: Measure, difference: float, resamples: int, rng: np.random.Generator
) -> float:
    """Return the p of a difference among those that swapping the sides' outputs gives.

    Raises:
        UndefinedMeasure: as `compute_measure`.
    """
    strata = [average_over_seeds(stratum) for stratum in strata] if measure is mean else strata
    others = draw_swaps(strata, measure, resamples, rng)
    return float((1 + np.count_nonzero(np.abs(others) >= abs(difference) - TINY)) / (1 + resamples))


def average_over_seeds(stratum: Stratum) -> Stratum:
    """Return a stratum as one pair of runs with each example's mean difference, all that swaps of a share depend on."""
    differences_GC = np.abs((stratum.outputs[0] - stratum.outputs[1]).mean(axis=0))
    values_GC, groups = np.unique(differences_GC.round(12), axis=0, return_inverse=True)
    sizes = np.bincount(groups.ravel(), weights=stratum.sizes)
    return Stratum(np.stack([values_GC, np.zeros_like(values_GC)])[:, None], sizes)


def draw_swaps(strata: list[Stratum], measure: Measure, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return the difference after R times swapping the sides' outputs of every example with probability 1/2."""
    found = []
    for count in iterate_blocks(resamples):
        moved = [rng.binomial(s.sizes.astype(int), 0.5, size=(count, len(s.sizes))) for s in strata]
        parts = [swap_outputs(s, measure, m_RG) for s, m_RG in zip(strata, moved, strict=True)]
        found.append(np.mean(parts, axis=0))
    return np.concatenate(found)


def swap_outputs(stratum: Stratum, measure: Measure, moved_RG: np.ndarray) -> np.ndarray:
    """Return the difference, a mean over pairs, when `moved_RG` examples of every group are the other side's."""
    stays_RG = stratum.sizes - moved_RG
    one, other = np.hstack([stays_RG, moved_RG]), np.hstack([moved_RG, stays_RG])
    both = [np.concatenate(pair) for pair in zip(*stratum.outputs, strict=True)]
    differences = [compute_measure(measure, o, one) - compute_measure(measure, o, other) for o in both]
    return np.mean(differences, axis=0)


def iterate_blocks(resamples: int) -> Iterator[int]:
    """Yield the sizes of the blocks that resamples are drawn in."""
    yield from (min(BLOCK, resamples - start) for start in range(0, resamples, BLOCK))


def compute_mcnemar_p(stratum: Stratum) -> float:
    """Return the p of McNemar's exact test on right and wrong answers of one run each."""
    ours, theirs = stratum.outputs[:, 0, :, 0]
    table = [[stratum.sizes[(ours == a) & (theirs == b)].sum() for b in (1, 0)] for a in (1, 0)]
    return float(mcnemar(table, exact=True).pvalue)
