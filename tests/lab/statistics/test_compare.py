"""Paired comparisons against direct computations, and what their p-values and intervals do under a known law."""

import itertools
import time
import warnings

import numpy as np
import pytest
import sacrebleu
from sacrebleu.significance import PairedTest
from scipy.stats import binomtest, pearsonr, permutation_test, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

import tasks
from dual_lora.lab.statistics.compare import compare_means, count_resamples, estimate_difference
from dual_lora.lab.statistics.multiple import adjust_holm
from dual_lora.lab.statistics.pairing import UnscorableRows
from dual_lora.lab.statistics.resampling import (
    UndefinedMeasure,
    average_over_seeds,
    compute_permutation_p,
    draw_swaps,
    group_equal_examples,
)
from dual_lora.lab.statistics.verdict import combine_p, reach_verdict
from tasks import measures, metrics
from tests.support.answers import chosen, judged, labels, numbers, results, written
from tests.support.imports import imported
from tests.support.places import ROOT


@pytest.fixture
def no_java(monkeypatch):
    """No METEOR, ROUGE-L and CIDEr, as where there is no Java."""

    def lack(*_):
        raise metrics.Unavailable("no Java")

    monkeypatch.setattr(metrics, "score_on_penn_tokens", lack)
    monkeypatch.setattr(metrics, "meteor", lack)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Metrics on weighted examples


def drawn(rng, examples, resamples=20):
    """Return indices of resamples and how often each example is in them."""
    indices = rng.integers(examples, size=(resamples, examples))
    return indices, np.stack([np.bincount(row, minlength=examples) for row in indices]).astype(float)


@pytest.mark.parametrize("classes", [2, 3])
def test_classification_on_a_resample_is_sklearns_on_the_same_examples(classes):
    rng = np.random.default_rng(classes)
    gold = rng.integers(classes, size=30)
    answers = np.array(labels(rng, gold, 0.6, classes))
    indices, weights = drawn(rng, 30)
    columns = np.stack([answers, gold], axis=1).astype(float)
    expected = [matthews_corrcoef(gold[i], answers[i]) for i in indices]
    np.testing.assert_allclose(measures.matthews(columns, weights), expected)
    right = (answers == gold).astype(float)[:, None]
    np.testing.assert_allclose(measures.mean(right, weights), [accuracy_score(gold[i], answers[i]) for i in indices])
    if classes == 2:
        np.testing.assert_allclose(measures.f1(columns, weights), [f1_score(gold[i], answers[i]) for i in indices])


def test_correlations_on_a_resample_are_scipys_on_the_same_examples():
    rng = np.random.default_rng(0)
    gold = np.round(rng.uniform(0, 5, size=40)) + 1000  # ties in both; far from zero
    columns = np.stack([numbers(rng, gold, 1.0), gold], axis=1)
    indices, weights = drawn(rng, 40)
    both = [(pearsonr(*columns[i].T)[0], spearmanr(*columns[i].T)[0]) for i in indices]
    np.testing.assert_allclose(measures.pearson(columns, weights), [p for p, _ in both], atol=1e-9)
    np.testing.assert_allclose(measures.spearman(columns, weights), [s for _, s in both], atol=1e-9)
    np.testing.assert_allclose(measures.pearson_spearman(columns, weights), np.mean(both, axis=1), atol=1e-9)


def test_a_constant_answer_has_no_correlation():
    columns = np.array([[1.1, 2.0], [1.1, 3.0], [1.1, 4.0], [2.3, 5.0]])
    constant, other = [[1.0, 1.0, 5.0, 0.0]], [[1.0, 0.0, 0.0, 1.0]]
    for measure in (measures.pearson, measures.spearman):
        assert measure(columns, np.array(constant)) == 0 and measure(columns, np.array(other)) == pytest.approx(1)
    ones = np.array([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    assert measures.matthews(ones, np.ones((1, 3))) == 0 and measures.f1(0 * ones, np.ones((1, 3))) == 0


@pytest.mark.parametrize("examples, end", [(40, ""), (40, " and the pub is cheap"), (3, "")])
def test_bleu_on_a_resample_is_the_tasks_own_on_the_same_examples(examples, end):
    """Outputs shorter than their references, longer ones, and few enough to lack a match of four words."""
    rows = [row | {"answer": row["answer"] + end} for row in written(5, 1, examples)[0]]
    indices, weights = drawn(np.random.default_rng(1), examples, 40)
    plain = np.array([measures.Bleu().columns(row) for row in rows])
    cased = np.array([measures.Bleu(lowercase=False, smooth=True).columns(row) for row in rows])
    expected, smoothed = [], []
    for index in indices:
        answers, references = zip(*((rows[i]["answer"], rows[i]["references"]) for i in index), strict=True)
        expected.append(metrics.bleu(answers, references))
        smoothed.append(min(sacrebleu.corpus_bleu(answers, list(zip(*references, strict=True))).score / 100, 1))
    np.testing.assert_allclose(measures.bleu(plain, weights), expected, atol=1e-12)
    np.testing.assert_allclose(measures.bleu(cased, weights, smooth=True), smoothed, atol=1e-12)
    assert (0 in expected) == (examples == 3) and 0 not in smoothed


def test_no_output_at_all_has_no_bleu():
    counts = np.array([measures.count_ngrams("", ("a pub",), True), measures.count_ngrams("a pub", ("a pub",), True)])
    assert measures.bleu(counts, np.array([[1.0, 0.0], [1.0, 1.0]])).tolist() == [0, 0]
    assert measures.bleu(counts, np.array([[1.0, 0.0]]), smooth=True) == 0


# The mean is the task's own score


def tell_apart(task, ours, theirs, without=()):
    """Assert that every score's mean difference is that of `task.score`; return the names of those with an interval."""
    scores = [[task.score(results(rows)) for rows in method] for method in (ours, theirs)]
    resampled = set()
    for metric in scores[0][0]:
        mine, others = (np.mean([s[metric] for s in method]) for method in scores)
        found = compare_means([dict(enumerate(ours))], [dict(enumerate(theirs))], task, metric, resamples=50)
        assert found.mean == pytest.approx(mine - others, abs=1e-12), metric
        if found.p is not None:
            resampled.add(metric)
            assert found.low <= found.high and 0 < found.p <= 1
        else:
            assert found.low is found.high is None and metric in found.test
    assert resampled == set(scores[0][0]) - set(without)
    return resampled


@pytest.mark.parametrize("name", ["glue/sst2", "glue/cola", "glue/mrpc", "glue/mnli"])
def test_every_score_of_a_classification_task(name):
    task, rng = tasks.load(name), np.random.default_rng(3)
    classes = len(task.labels)
    gold = {split: rng.integers(classes, size=60) for split in task.eval_splits}
    runs = [
        [row for split, g in gold.items() for row in judged(labels(rng, g, 0.8, classes), g.tolist(), split)]
        for _ in range(4)
    ]
    found = tell_apart(task, runs[:2], runs[2:])
    assert task.metric in found and len(found) == {2: 3, 3: 4}[classes]


def test_every_score_of_a_regression_task():
    rng = np.random.default_rng(4)
    gold = np.round(rng.uniform(0, 5, size=50), 1)
    runs = [judged(numbers(rng, gold, 1.0), gold.tolist()) for _ in range(4)]
    assert tell_apart(tasks.load("glue/stsb"), runs[:2], runs[2:]) == {"pearson", "spearman", "pearson_spearman_mean"}


def test_every_score_of_commonsense():
    task, rng = tasks.load("commonsense"), np.random.default_rng(5)
    sizes = {split: 20 + 30 * i for i, split in enumerate(task.eval_splits)}
    runs = [chosen(rng, sizes, 0.7) for _ in range(4)]
    without = [{k: v for k, v in row.items() if k != "likelihood_score"} for row in runs[0]]
    with pytest.raises(ValueError, match="likelihood_average: the predictions of a run have no 'likelihood_score'"):
        compare_means([{0: runs[0]}], [{0: without}], task, "likelihood_average")
    assert len(tell_apart(task, runs[:2], runs[2:])) == 3 * 9 + 2 * 8


def test_every_score_of_the_generation_tasks(no_java):
    runs = written(6, 4)
    slow = {"e2e": {"NIST"}, "dart": {"TER"}, "webnlg": {"TER", "seen_TER", "unseen_TER"}}
    for name, without in slow.items():
        tell_apart(tasks.load(name), runs[:2], runs[2:], without)
    changed = [[row | {"split": "validation"} for row in rows] for rows in runs]
    tell_apart(tasks.load("demo/restaurants"), changed[:2], changed[2:], {"slot_accuracy"})


def test_a_score_that_no_task_gives_or_that_cannot_be_computed_here_is_named(no_java):
    run = {0: judged([0, 1], [0, 1])}
    with pytest.raises(ValueError, match="glue/sst2 gives no bleu here, only accuracy, matthews, f1"):
        compare_means([run], [run], tasks.load("glue/sst2"), "bleu")
    with pytest.raises(ValueError, match="glue/mnli gives no f1"):
        matched = [{0: judged([0, 1, 2], [0, 1, 2], "validation_matched")}]
        compare_means(matched, matched, tasks.load("glue/mnli"), "f1")
    (rows,) = written(0, 1)
    with pytest.raises(ValueError, match="e2e gives no METEOR here, only BLEU, NIST"):
        compare_means([{0: rows}], [{0: rows}], tasks.load("e2e"), "METEOR")
    with pytest.raises(ValueError, match="mismatched_accuracy: no prediction belongs to it"):
        run = {0: judged([0, 1], [0, 1], "validation_matched")}
        compare_means([run], [run], tasks.load("glue/mnli"), "mismatched_accuracy")


# Intervals and p-values against direct computations


def pair(seed, examples=60, seeds=2, ours=0.8, theirs=0.7):
    """Return two methods' runs of glue/cola and their gold."""
    rng = np.random.default_rng(seed)
    gold = rng.integers(2, size=examples)
    methods = [
        {s: judged(labels(rng, gold, accuracy), gold.tolist()) for s in range(seeds)} for accuracy in (ours, theirs)
    ]
    return *methods, gold


def answers(runs) -> np.ndarray:
    """Return answers of shape (seeds, examples)."""
    return np.array([[row["answer"] for row in rows] for rows in runs.values()])


@pytest.mark.parametrize("seeds", [1, 3])
def test_interval_is_that_of_a_bootstrap_by_loop(seeds):
    """Matthews correlation of two classes is the correlation of their numbers."""
    ours, theirs, gold = pair(1, 120, seeds)
    found = compare_means([ours], [theirs], tasks.load("glue/cola"), "matthews", resamples=4000)
    one, other = answers(ours), answers(theirs)
    rng, by_loop = np.random.default_rng(7), []
    for _ in range(3000):
        examples, again = rng.integers(120, size=120), rng.integers(seeds, size=seeds)
        scores = [[np.corrcoef(gold[examples], m[s][examples])[0, 1] for s in again] for m in (one, other)]
        by_loop.append(np.mean(scores[0]) - np.mean(scores[1]))
    low, high = np.percentile(by_loop, (2.5, 97.5))
    width = high - low
    assert found.low == pytest.approx(low, abs=0.07 * width) and found.high == pytest.approx(high, abs=0.07 * width)


def test_seeds_that_disagree_widen_the_interval():
    gold = np.zeros(400, dtype=int)
    good, bad = judged(gold.tolist(), gold.tolist()), judged(((np.arange(400) < 100) * 1).tolist(), gold.tolist())
    task = tasks.load("glue/sst2")
    alike, apart = ({0: good, 1: second} for second in (good, bad))
    theirs = {0: bad, 1: bad}
    narrow, wide = (compare_means([ours], [theirs], task, "accuracy") for ours in (alike, apart))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low) and wide.low == 0


@pytest.mark.parametrize("metric", ["accuracy", "matthews", "f1"])
def test_p_is_that_of_scipys_permutation_test(metric):
    ours, theirs, gold = pair(4, 8, 2, 0.95, 0.4)
    measure = {"accuracy": accuracy_score, "matthews": matthews_corrcoef, "f1": f1_score}[metric]

    def statistic(one, other):
        pairs = zip(*(np.array(side).reshape(8, 2).T for side in (one, other)), strict=True)
        return np.mean([measure(gold, a) - measure(gold, b) for a, b in pairs])

    # every example is one number that stands for the answers of both seeds
    codes = [answers(m).T @ (2, 1) for m in (ours, theirs)]

    def decoded(one, other):
        return statistic(*([(c // 2, c % 2) for c in side] for side in (one, other)))

    expected = permutation_test(codes, decoded, permutation_type="samples", n_resamples=np.inf, vectorized=False)
    found = compare_means([ours], [theirs], tasks.load("glue/cola"), metric, resamples=8000)
    assert found.test == "paired permutation" and found.mean == pytest.approx(expected.statistic)
    assert 0 < expected.pvalue < 0.3 and found.p == pytest.approx(expected.pvalue, abs=0.02)


@pytest.mark.parametrize(("name", "metric"), [("glue/sst2", "accuracy"), ("glue/stsb", "pearson")])
def test_several_methods_of_a_side_are_averaged_and_swapped_together(name, metric):
    rng, shared = np.random.default_rng(8), metric == "accuracy"
    gold = rng.integers(0, 2, size=9) if shared else np.round(rng.uniform(0, 5, size=9), 1)
    measure = accuracy_score if shared else lambda gold, answers: pearsonr(gold, answers)[0]
    noise = (0.9, 0.5, 0.3) if shared else (0.4, 3.0, 2.0)
    draw = labels if shared else numbers
    one, *others = ({seed: np.array(draw(rng, gold, n)) for seed in range(2)} for n in noise)

    def subtract(one, others):
        return measure(gold, one) - np.mean([measure(gold, other) for other in others])

    by_seed = [subtract(one[seed], [other[seed] for other in others]) for seed in range(2)]
    by_loop = []
    for mask in itertools.product([True, False], repeat=9):
        pairs = [(one[seed], other[seed]) for seed in range(2) for other in others]
        swapped = [(np.where(mask, a, b), np.where(mask, b, a)) for a, b in pairs]
        by_loop.append(np.mean([measure(gold, a) - measure(gold, b) for a, b in swapped]))
    p = np.mean(np.abs(by_loop) >= abs(by_loop[0]) - 1e-9)
    sides = [[{s: judged(a[s].tolist(), gold.tolist()) for s in a} for a in side] for side in ([one], others)]
    found = compare_means(*sides, tasks.load(name), metric, resamples=8000)
    assert found.by_seed == pytest.approx(by_seed) and found.mean == pytest.approx(np.mean(by_seed))
    assert found.seeds == 2 and found.low < found.mean < found.high
    assert 0 < p < 0.5 and found.p == pytest.approx(p, abs=0.02)


def test_a_method_that_is_on_a_side_twice_changes_nothing():
    ours, theirs, _ = pair(4, 60, 3)
    task = tasks.load("glue/cola")
    once = compare_means([ours], [theirs], task, "matthews")
    assert compare_means([ours], [theirs, theirs], task, "matthews") == once


def test_a_share_needs_no_more_than_mean_differences():
    ours, theirs, gold = pair(5, 200, 3)
    outputs = np.array([(answers(method) == gold)[..., None] for method in (ours, theirs)], dtype=float)
    whole = group_equal_examples(outputs)
    few = average_over_seeds(whole)
    assert len(few.sizes) <= 4 < len(whole.sizes) and few.sizes.sum() == 200
    spread = [draw_swaps([s], measures.mean, 4000, np.random.default_rng(1)) for s in (whole, few)]
    assert np.std(spread[0]) == pytest.approx(np.std(spread[1]), rel=0.06)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_p_of_a_correlation_is_that_of_a_loop(metric):
    rng = np.random.default_rng(8)
    gold = np.round(rng.uniform(0, 5, size=9), 1)
    one, other = np.array(numbers(rng, gold, 0.4)), np.array(numbers(rng, gold, 3.0))
    measure = {"pearson": pearsonr, "spearman": spearmanr}[metric]
    by_loop = []
    for mask in itertools.product([True, False], repeat=9):
        a, b = np.where(mask, one, other), np.where(mask, other, one)
        by_loop.append(measure(a, gold)[0] - measure(b, gold)[0])
    p = np.mean(np.abs(by_loop) >= abs(by_loop[0]) - 1e-9)
    runs = ([{0: judged(a.tolist(), gold.tolist())}] for a in (one, other))
    assert compare_means(*runs, tasks.load("glue/stsb"), metric, resamples=8000).p == pytest.approx(p, abs=0.02)


def test_p_of_bleu_is_that_of_sacrebleus_own_test(monkeypatch):
    monkeypatch.setenv("SACREBLEU_SEED", "1")
    ours, theirs = written(2, 2)
    ours = [row | {"answer": row["references"][0]} if i % 4 == 0 else row for i, row in enumerate(ours)]
    streams = list(zip(*(row["references"] for row in ours), strict=True))
    systems = [(name, [row["answer"] for row in rows]) for name, rows in (("theirs", theirs), ("ours", ours))]
    scorer = {"BLEU": sacrebleu.BLEU(lowercase=True, smooth_method="none")}
    _, table = PairedTest(systems, scorer, streams, "ar", n_samples=4000)()
    found = compare_means([{0: ours}], [{0: theirs}], tasks.load("e2e"), "BLEU", resamples=4000)
    assert 100 * found.mean == pytest.approx(table["BLEU"][1].score - table["BLEU"][0].score)
    assert found.p == pytest.approx(table["BLEU"][1].p_value, abs=0.02)


def test_one_seed_of_right_and_wrong_answers_is_mcnemars_exact_test():
    ours, theirs, gold = pair(3, 200, 1)
    found = compare_means([ours], [theirs], tasks.load("glue/sst2"), "accuracy")
    one, other = (answers(m)[0] == gold for m in (ours, theirs))
    only_ours, only_theirs = (one & ~other).sum(), (other & ~one).sum()
    assert found.test == "McNemar" and found.p == pytest.approx(binomtest(only_ours, only_ours + only_theirs).pvalue)
    assert (found.examples, found.seeds) == (200, 1)
    same = compare_means([ours], [ours], tasks.load("glue/sst2"), "accuracy")
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_a_mean_over_splits_weighs_splits_alike():
    """One small set won, one large lost: McNemar over all examples would say the opposite of the average."""
    sizes = {"boolq": 40, "piqa": 800}
    rows = [row for split, n in sizes.items() for row in judged(["x"] * n, ["x"] * n, split)]
    ours = [row | {"score": float(row["split"] == "boolq" or int(row["id"][5:]) >= 60)} for row in rows]
    theirs = [row | {"score": float(row["split"] == "piqa" or int(row["id"][6:]) >= 20)} for row in rows]
    task = tasks.load("commonsense")
    found = compare_means([{0: ours}], [{0: theirs}], task, "average")
    assert found.mean == pytest.approx((0.5 - 60 / 800) / 2) and found.low > 0 and found.p < 0.01
    assert found.test == "paired permutation" and found.examples == 840
    alone = compare_means([{0: ours}], [{0: theirs}], task, "boolq")
    assert alone.test == "McNemar" and alone.examples == 40 and alone.mean == 0.5
    spread = np.sqrt(0.25 / 40 + 0.075 * 0.925 / 800) / 2  # of half the sum of two shares
    assert (found.high - found.low) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.06)


# Under a known law


def shares(ours, theirs, metric, seeds, sets=300, examples=100):
    """Return over simulated data sets how often p < 0.05 and how often the interval holds the true difference of 0."""
    small, held = 0, 0
    for number in range(sets):
        one, other, _ = pair(1000 + number, examples, seeds, ours, theirs)
        found = compare_means([one], [other], tasks.load("glue/cola"), metric, resamples=200, seed=number)
        small, held = small + (found.p < 0.05), held + (found.low <= 0 <= found.high)
    return small / sets, held / sets


@pytest.mark.parametrize(
    "metric, seeds, least",
    [("accuracy", 1, 0.003), ("accuracy", 2, 0.02), ("matthews", 1, 0.02), ("matthews", 2, 0.02)],
)
def test_two_methods_of_one_law_are_rarely_told_apart(metric, seeds, least):
    """Of 300 sets 5 % are 15 with a standard deviation of 3.8; McNemar's exact test has fewer."""
    small, held = shares(0.8, 0.8, metric, seeds)
    assert least <= small <= 0.085
    assert 0.90 <= held <= 0.99


@pytest.mark.parametrize("metric, seeds", [("accuracy", 1), ("accuracy", 2), ("matthews", 2)])
def test_a_real_difference_is_found(metric, seeds):
    small, held = shares(0.92, 0.7, metric, seeds, sets=60)
    assert small > 0.9 and held < 0.1


# Properties


@pytest.mark.parametrize("metric", ["accuracy", "matthews", "f1"])
@pytest.mark.parametrize("seeds", [1, 2])
def test_swapping_the_methods_changes_the_sign(metric, seeds):
    ours, theirs, _ = pair(9, seeds=seeds)
    task = tasks.load("glue/cola")
    one, other = compare_means([ours], [theirs], task, metric), compare_means([theirs], [ours], task, metric)
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low), abs=1e-12)
    assert one.p == other.p and one.mean > 0


def test_the_same_seed_gives_the_same_numbers_and_order_of_rows_none_other():
    ours, theirs, _ = pair(10)
    task = tasks.load("glue/cola")
    first = compare_means([ours], [theirs], task, "matthews", seed=1)
    assert (
        first
        == compare_means([ours], [theirs], task, "matthews", seed=1)
        != compare_means([ours], [theirs], task, "matthews", seed=2)
    )
    assert first == compare_means([ours], [{s: rows[::-1] for s, rows in theirs.items()}], task, "matthews", seed=1)


def test_only_seeds_of_both_methods_count():
    ours, theirs, _ = pair(11, seeds=3)
    task = tasks.load("glue/sst2")
    found = compare_means([ours], [{s: theirs[s] for s in (0, 2)}], task, "accuracy")
    assert found == compare_means([{s: ours[s] for s in (2, 0)}], [{s: theirs[s] for s in (0, 2)}], task, "accuracy")
    assert found.seeds == 2
    with pytest.raises(ValueError, match=r"no seed in common: \[0, 1, 2\] against \[7\]"):
        compare_means([ours], [{7: theirs[0]}], task, "accuracy")


def test_runs_on_other_data_are_refused():
    task = tasks.load("glue/sst2")
    rows = judged([0, 1, 1], [0, 1, 0])
    other = {
        "3 examples in one run, 2 in another; 1 are in one only, such as validation validation-2": rows[:2],
        "gold of validation validation-2 is 0 in one run, 1 in another": judged([0, 1, 1], [0, 1, 1]),
        "references of validation validation-0 is None in one run": [row | {"references": ["x"]} for row in rows],
    }
    for message, changed in other.items():
        with pytest.raises(ValueError, match=f"changed data: {message}"):
            compare_means([{0: rows}], [{0: changed}], task, "accuracy")
        with pytest.raises(ValueError, match="changed data"):  # in another seed of the same method, too
            compare_means([{0: rows, 1: changed}], [{0: rows, 1: rows}], task, "accuracy")
    with pytest.raises(ValueError, match="6 predictions of 3 examples"):
        compare_means([{0: rows}], [{0: rows + rows}], task, "accuracy")
    with pytest.raises(ValueError, match="0 predictions"):
        compare_means([{0: []}], [{0: []}], task, "accuracy")


# Scores that are undefined on some rows


def precision(columns_NC, weights_RN):
    """The share of right ones among the answers 1: 0/0 where there is none."""
    return weights_RN @ columns_NC.prod(axis=1) / (weights_RN @ columns_NC[:, 0])


def fail(columns_NC, weights_RN):
    raise ZeroDivisionError


@pytest.fixture
def measured(monkeypatch):
    """A function that gives RTE's accuracy another measure, and returns the task."""

    def declare(measure):
        task = tasks.load("glue/rte")
        score = measures.Score(measures.get_answer_and_gold, measure)
        monkeypatch.setattr(type(task), "declare_scores", lambda self, example: {"accuracy": score})
        return task

    return declare


def answer_one(*positions):
    """Return the rows of a run that answers 1 at some of 200 positions; 1 is right at the first hundred."""
    return judged([int(i in positions) for i in range(200)], [int(i < 100) for i in range(200)])


FEW_ANSWERS = (
    {seed: answer_one(0, 1, 2) for seed in range(5)},
    {seed: answer_one(100, 101, 102, *[3][seed:]) for seed in range(5)},
)  # of 200 rows drawn again, 5 % have none of three


def test_a_score_that_is_undefined_on_a_resample_is_not_tested(measured):
    ours, theirs = FEW_ANSWERS
    found = compare_means([ours], [theirs], measured(precision), "accuracy")
    assert found.test == "no test: accuracy is NaN or infinite on some resamples"
    assert found.by_seed == pytest.approx([0.75, 1, 1, 1, 1]) and found.mean == pytest.approx(0.95)
    assert found.low is found.high is found.p is combine_p(found) is None
    assert reach_verdict(found, None, None) == "undecided"
    with pytest.raises(UnscorableRows, match="^accuracy is NaN or infinite on some resamples$"):
        estimate_difference(ours, theirs, measured(precision), "accuracy")
    defined = compare_means([ours], [theirs], measured(measures.quotient), "accuracy")
    assert defined.test == "paired permutation"


def test_a_swap_without_a_score_is_no_smaller_difference():
    outputs = np.array([[[1.0, 1.0]] * 2 + [[0.0, 0.0]] * 2, [[0.0, 1.0]] * 2 + [[1.0, 0.0]] * 2])
    strata = [group_equal_examples(outputs[:, None])]
    with pytest.raises(UndefinedMeasure, match="^is NaN or infinite$"):
        compute_permutation_p(strata, precision, 1.0, 100, np.random.default_rng(0))


@pytest.mark.parametrize(("measure", "said"), [(precision, "is NaN or infinite"), (fail, "fails")])
def test_a_run_without_a_score_cannot_be_compared(measured, measure, said):
    runs = {0: answer_one(0)}, {0: answer_one()}
    for compare in (compare_means, lambda ours, theirs, *more: estimate_difference(ours[0], theirs[0], *more)):
        with pytest.raises(UnscorableRows, match=f"^accuracy {said}.* for the predictions of a run$"):
            compare([runs[0]], [runs[1]], measured(measure), "accuracy")


def test_a_tasks_own_score_must_be_finite(monkeypatch):
    task = tasks.load("glue/rte")
    monkeypatch.setattr(type(task), "score", lambda self, results: {"kappa": float("nan")})
    with pytest.raises(UnscorableRows, match="^kappa is nan for the predictions of a run$"):
        compare_means([{0: answer_one(0)}], [{0: answer_one(1)}], task, "kappa")


@pytest.mark.parametrize("metric, seconds", [("accuracy", 2), ("matthews", 2), ("pearson", 2), ("spearman", 4)])
def test_872_examples_of_two_seeds_take_seconds_at_most(metric, seconds):
    rng = np.random.default_rng(12)
    if metric in ("accuracy", "matthews"):
        ours, theirs, _ = pair(12, 872)
        task = tasks.load("glue/sst2")
    else:
        gold = rng.uniform(0, 5, size=872)
        runs = [judged((gold + rng.normal(size=872)).tolist(), gold.tolist()) for _ in range(4)]
        ours, theirs = dict(enumerate(runs[:2])), dict(enumerate(runs[2:]))
        task = tasks.load("glue/stsb")

    def took() -> float:
        start = time.process_time()
        compare_means([ours], [theirs], task, metric)
        return time.process_time() - start

    assert any(took() < seconds for _ in range(3))  # a busy machine counts what others do, too


def test_it_knows_nothing_of_training():
    for path in (ROOT / "dual_lora/lab/statistics").glob("*.py"):
        names = {name for name in imported(path) if not name.startswith("dual_lora.lab.statistics.")}
        roots = {name.split(".")[0] for name in names}
        assert not roots & {"torch", "transformers", "peft", "matplotlib", "dual_lora", "pathlib", "os"}


# Over comparisons


def test_holm_by_hand():
    assert adjust_holm([0.01, None, 0.04, 0.03]) == [
        pytest.approx(0.03),
        None,
        pytest.approx(0.06),
        pytest.approx(0.06),
    ]
    assert adjust_holm([0.6, 0.9]) == [1, 1] and adjust_holm([None]) == [None] and adjust_holm([]) == []


def test_holm_counts_what_is_planned_and_unknown():
    assert adjust_holm([0.01, None, 0.03], family=5) == [pytest.approx(0.05), None, pytest.approx(0.12)]
    assert adjust_holm([0.01, 0.03], family=2) == adjust_holm([0.01, 0.03])
    assert adjust_holm([None], family=3) == [None] and adjust_holm([], family=3) == []


@pytest.mark.parametrize("comparisons", [1, 5, 64, 192, 1000])
def test_the_smallest_p_of_a_family_can_be_shown(comparisons):
    ours, theirs, _ = pair(21, 100, 2, 1.0, 0.5)
    found = compare_means([ours], [theirs], tasks.load("glue/cola"), "matthews", comparisons=comparisons)
    assert found.p == 1 / (1 + count_resamples(comparisons)) <= 1 / 2001
    assert adjust_holm([found.p, *[1.0] * (comparisons - 1)])[0] < 0.05 / 10
    even, other, _ = pair(22, 100, 2, 0.8, 0.8)
    counts = (1, comparisons)
    one, many = (compare_means([even], [other], tasks.load("glue/cola"), "matthews", comparisons=n) for n in counts)
    assert one == many and one.p > 0.05  # a large p needs no more resamples
