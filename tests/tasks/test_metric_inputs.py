"""What has no right number is refused by name, not scored: texts in place of lists, other shapes, NaN, no rows."""

import gzip
import math
import os

import pytest
import torch

from dual_lora import analysis, delta_weight, init_std
from tasks import glue, metrics
from tasks.base import TaskError

OUTPUTS = ["the cat sat on the mat", "a dog ran fast away"]
ACCEPTED = [["the cat sat on a mat"], ["a dog ran away fast"]]
CORPUS = [metrics.bleu, metrics.nist, metrics.score_e2e, metrics.score_webnlg]
SINGLE = [metrics.sentence_bleu, metrics.sentence_chrf, metrics.rouge_l, metrics.ter]
NAN, INF = torch.full((3, 3), math.nan), torch.full((3, 3), math.inf)
EYE = torch.eye(3)


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


@pytest.mark.parametrize("measure", [analysis.compute_ranks, analysis.compute_zero_share, analysis.count_dead_rows])
@pytest.mark.parametrize("matrix", [NAN, INF, torch.ones(2, 3, 3), torch.ones(0, 3), torch.ones(3)])
def test_only_a_finite_matrix_is_measured(measure, matrix):
    with pytest.raises(ValueError, match="matri"):
        measure(matrix)


@pytest.mark.parametrize("compare", [analysis.compare_updates, analysis.compute_cosine, analysis.compute_relative_size])
@pytest.mark.parametrize("other", [torch.ones(3, 1), torch.ones(1), torch.ones(2, 3, 3), NAN, INF])
def test_only_matrices_of_one_shape_are_compared(compare, other):
    for pair in ((EYE, other), (other, EYE)):
        with pytest.raises(ValueError, match=r"shape|NaN"):
            compare(*pair)


def test_nan_is_in_no_bin():
    with pytest.raises(ValueError, match="NaN"):
        analysis.count_by_bin(NAN, analysis.MAGNITUDE_EDGES)


@pytest.mark.parametrize("use", [lambda *four: delta_weight(*four, 1.0), analysis.measure_groups])
@pytest.mark.parametrize("shape", [(2, 1), (2, 7), (1, 2, 5)])
def test_products_of_other_shapes_are_not_broadcast(use, shape):
    A, B, D = torch.ones(2, 5), torch.ones(6, 2), torch.ones(6, 2)
    with pytest.raises(ValueError, match=r"C: .*: expected A: r1 x in"):
        use(A, B, torch.ones(shape), D)


@pytest.mark.parametrize("fields", [{"magnitude": "rellu"}, {"direction": "signs"}])
def test_groups_of_an_unknown_variant_are_not_measured(fields):
    with pytest.raises(ValueError, match="expected one of"):
        analysis.measure_groups(torch.ones(2, 5), torch.ones(6, 2), torch.ones(2, 5), torch.ones(6, 2), **fields)


def test_signs_of_other_shapes_are_not_compared():
    C, D = torch.ones(2, 5), torch.ones(6, 2)
    with pytest.raises(ValueError, match="one shape"):
        analysis.compute_flipped_share(C, D, torch.ones(2, 1), D)


@pytest.mark.parametrize("fields", [{"alpha": math.inf}, {"magnitude": "rellu"}, {"direction": "signs"}])
def test_the_rule_for_sigma_knows_its_values(fields):
    with pytest.raises(ValueError, match="expected"):
        init_std(**{"fan_in": 8, "r1": 2, "r2": 2, "alpha": 16.0, **fields})


# Files.

TABLE = "sentence\tlabel\nfine\t1\n"


@pytest.fixture
def sst2(tmp_path):
    """A folder with SST-2's two files."""
    folder = tmp_path / "SST-2"
    folder.mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text(TABLE)
    return folder


def read(folder):
    return glue.task("sst2").split("train", str(folder.parent)).rows.to_list()


def test_of_a_file_and_its_gz_with_other_data_none_is_chosen(sst2):
    with gzip.open(sst2 / "train.tsv.gz", "wt") as stream:
        stream.write(TABLE)
    assert len(read(sst2)) == 1
    with gzip.open(sst2 / "train.tsv.gz", "at") as stream:
        stream.write("bad\t0\n")
    with pytest.raises(TaskError, match="hold different data; keep one"):
        read(sst2)


def test_a_long_document_is_one_field(sst2):
    (sst2 / "train.tsv").write_text(f"sentence\tlabel\n{'word ' * 40_000}\t0\n")
    (row,) = read(sst2)
    assert len(row["text"]) == 200_000


def test_nobody_waits_for_a_pipe(sst2):
    (sst2 / "train.tsv").unlink()
    os.mkfifo(sst2 / "train.tsv")
    with pytest.raises(TaskError, match="a pipe or a device, not a file"):
        read(sst2)
