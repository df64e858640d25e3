"""Made-up answers of runs to the same examples."""

import itertools

import numpy as np

WORDS = ["the", "a", "pub", "near", "river", "serves", "cheap", "food", "and", "is", "family", ",", "can", "not"]


def judged(answers, gold, split="validation") -> list[dict]:
    pairs = enumerate(zip(answers, gold, strict=True))
    return [{"split": split, "id": f"{split}-{i}", "output": a, "answer": a, "gold": g} for i, (a, g) in pairs]


def labels(rng, gold, accuracy, classes=2) -> list[int]:
    """Return answers that are right with probability `accuracy`, else any other class."""
    wrong = (gold + rng.integers(1, classes, size=len(gold))) % classes
    return np.where(rng.random(len(gold)) < accuracy, gold, wrong).tolist()


def numbers(rng, gold, noise) -> list[float]:
    return np.round(gold + noise * rng.normal(size=len(gold)), 1).tolist()


def text(rng, low=1, high=9) -> str:
    return " ".join(rng.choice(WORDS, size=rng.integers(low, high)))


def written(seed, runs, examples=40) -> list[list[dict]]:
    """Return `runs` runs of generated texts on the same examples, some as a reference has it, some too short."""
    rng, shared = np.random.default_rng(seed), np.random.default_rng(99)
    references = [[text(shared, 4, 9) for _ in range(3)] for _ in range(examples)]
    groups = ["seen" if i % 3 else "unseen" for i in range(examples)]
    found = []
    for _ in range(runs):
        answers = [rng.choice(rs) if rng.random() < 0.5 else text(rng) for rs in references]
        rows = judged([str(a) for a in answers], [rs[0] for rs in references], "test")
        extra = zip(rows, references, groups, strict=True)
        found.append([row | {"references": rs, "group": g, "slots": True} for row, rs, g in extra])
    return found


def chosen(rng, sizes, accuracy) -> list[dict]:
    """Return one run's rows of commonsense with the strict, lenient and likelihood scores."""
    rows = []
    for split, size in sizes.items():
        scores = [(rng.random(size) < accuracy).astype(float) for _ in range(3)]
        for row, *three in zip(judged(["x"] * size, ["x"] * size, split), *scores, strict=True):
            answers = {"answer": "x" if rng.random() < 0.9 else "", "lenient_answer": "x"}
            rows.append(row | answers | dict(zip(("score", "lenient_score", "likelihood_score"), three, strict=True)))
    return rows


def results(rows) -> dict[str, list[dict]]:
    return {split: list(group) for split, group in itertools.groupby(rows, key=lambda row: row["split"])}
