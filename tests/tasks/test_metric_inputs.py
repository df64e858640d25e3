"""What has no right score is refused by name, not scored: texts in place of lists, other lengths, no rows."""

import pytest

from tasks import metrics

OUTPUTS = ["the cat sat on the mat", "a dog ran fast away"]
ACCEPTED = [["the cat sat on a mat"], ["a dog ran away fast"]]
CORPUS = [metrics.bleu, metrics.nist, metrics.score_e2e, metrics.score_webnlg]
SINGLE = [metrics.sentence_bleu, metrics.sentence_chrf, metrics.rouge_l, metrics.ter]


@pytest.mark.parametrize("score", CORPUS)
@pytest.mark.parametrize(
    ("outputs", "accepted", "message"),
    [
        (OUTPUTS, [texts[0] for texts in ACCEPTED], "not a list of accepted texts"),
        (OUTPUTS, ACCEPTED[:1], "2 outputs for 1 lists"),
        (OUTPUTS[:1], ACCEPTED, "1 outputs for 2 lists"),
        (OUTPUTS, [*ACCEPTED[:1], []], "not a list of accepted texts"),
        (OUTPUTS, [["a", None], ["b"]], "not a list of accepted texts"),
        (["a", None], ACCEPTED, "not a list of texts"),
        ("ab", ACCEPTED, "not a list of texts"),
        ([], [], "0 outputs"),
    ],
)
def test_outputs_need_lists_of_texts(score, outputs, accepted, message):
    with pytest.raises(ValueError, match=message):
        score(outputs, accepted)


@pytest.mark.parametrize("score", SINGLE)
@pytest.mark.parametrize("accepted", ["the cat sat on a mat", [], [None]])
def test_one_output_needs_a_list_of_texts(score, accepted):
    with pytest.raises(ValueError, match="not a list of accepted texts"):
        score(OUTPUTS[0], accepted)


def test_every_output_has_a_group():
    with pytest.raises(ValueError, match="1 groups for 2 outputs"):
        metrics.score_webnlg(OUTPUTS, ACCEPTED, ["seen"])


@pytest.mark.parametrize(("answers", "gold"), [([], []), ([1.0, 1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [1.0])])
def test_numbers_are_correlated_in_pairs(answers, gold):
    with pytest.raises(ValueError, match="every one needs an answer"):
        metrics.score_regression(answers, gold)


def test_several_classes_are_not_one():
    with pytest.raises(ValueError, match="not one class"):
        metrics.macro_f1([[1, 0], [0, 1]], [[1, 0], [1, 0]])
