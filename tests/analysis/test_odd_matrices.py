"""Matrices that measures of updates seldom meet: integers, huge values, zeros, NaN, other shapes."""

import math

import pytest
import torch

from dual_lora import analysis, delta_weight
from dual_lora.analysis import DIRECTION_EDGES, compute_ranks, count_by_bin
from dual_lora.analysis.curvature import compute_curvature
from dual_lora.analysis.truncation import Decomposition


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float32])
def test_integers_are_counted_in_the_bins_of_real_numbers(dtype):
    x = torch.tensor([-100, -3, -1, 0, 1, 3, 100])
    edges = torch.tensor(DIRECTION_EDGES, dtype=torch.float64)
    expected = [int((torch.cat([edges.new_tensor([-torch.inf]), edges]) < value).sum()) - 1 for value in x]
    counts = count_by_bin(x.to(dtype), DIRECTION_EDGES)
    assert [i for i, count in enumerate(counts) for _ in range(count)] == sorted(expected)


def test_booleans_are_counted_as_0_and_1():
    assert count_by_bin(torch.tensor([True, False, True]), (0.0, 0.5)) == [1, 0, 2]


@pytest.mark.parametrize("size", [1.0, 3e38])
def test_ranks_do_not_depend_on_the_size_of_the_entries(size):
    W = size * torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    ranks = compute_ranks(W)
    assert ranks["rank"] == ranks["rank_0.1"] == 1
    assert ranks["stable_rank"] == pytest.approx(1) and ranks["effective_rank"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_cut(value):
    with pytest.raises(ValueError, match=r"^matrix dW \(2 x 3\) contains NaN or Inf"):
        Decomposition.compute(torch.full((2, 3), value))


@pytest.mark.parametrize("multiplier", [1.0, 0.0])
def test_a_loss_without_curvature_has_the_eigenvalue_0(multiplier):
    p = torch.randn(5, requires_grad=True)
    losses = {1.0: lambda: (0 * p**3).sum(), 0.0: lambda: (p**2).sum()}
    assert compute_curvature(losses[multiplier], [p], [multiplier]).eigenvalue == 0.0


def test_a_loss_that_is_nan_has_no_curvature():
    p = torch.randn(5, requires_grad=True)
    with pytest.raises(ValueError, match=r"^loss_of\(\) returned nan"):
        compute_curvature(lambda: (p * torch.nan).square().sum(), [p])


# What has no right number is refused by name: other shapes, NaN, unknown variants.


NAN, INF = torch.full((3, 3), math.nan), torch.full((3, 3), math.inf)


EYE = torch.eye(3)


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
