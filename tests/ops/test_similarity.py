import math

import pytest
import torch

from peft_loramoe.ops.similarity import cosines, inner_products, subspace_overlaps


pytestmark = pytest.mark.version_independent


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_inner_products_are_those_of_the_whole_matrices():
    A, B = random(6, 5), random(7, 6, seed=1)
    matrices = [B[:, i : i + 2] @ A[i : i + 2] for i in (0, 2, 4)]
    expected = torch.tensor([[(first * second).sum().item() for second in matrices] for first in matrices]).double()
    torch.testing.assert_close(inner_products(A, B, 2), expected, rtol=1e-6, atol=1e-6)


def test_inner_products_are_float64_whatever_the_dtype():
    A, B = random(4, 5).bfloat16(), random(7, 4, seed=1).bfloat16()
    torch.testing.assert_close(inner_products(A, B, 2), inner_products(A.double(), B.double(), 2), rtol=0, atol=0)


def test_cosines():
    inner = torch.tensor([[4.0, -3.0], [-3.0, 9.0]])
    torch.testing.assert_close(cosines(inner), torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))


def test_rounding_takes_no_cosine_beyond_one():
    assert cosines(torch.tensor([[1.0, 1.001], [1.001, 1.0]])).max() == 1


def test_a_zero_matrix_has_no_cosine():
    assert cosines(torch.tensor([[1.0, 0.0], [0.0, 0.0]])).isnan().tolist() == [[False, True], [True, True]]


def test_overlaps_are_mean_squared_cosines_of_the_principal_angles():
    matrices = random(3, 9, 4)
    overlaps = subspace_overlaps(matrices)
    for i in range(3):
        for j in range(3):
            bases = [torch.linalg.qr(matrix).Q for matrix in (matrices[i], matrices[j])]
            angles = torch.linalg.svdvals(bases[0].T @ bases[1]).clamp(max=1).acos()
            assert overlaps[i, j].item() == pytest.approx((angles.cos() ** 2).mean().item(), abs=1e-9)


def test_planes_at_an_angle():
    axes = torch.eye(4, dtype=torch.float64)
    turned = math.cos(0.3) * axes[:, 1] + math.sin(0.3) * axes[:, 2]
    overlap = subspace_overlaps(torch.stack([axes[:, :2], torch.stack([axes[:, 0], turned], dim=1)]))[0, 1]
    assert overlap.item() == pytest.approx((1 + math.cos(0.3) ** 2) / 2)


def test_overlaps_depend_on_the_spaces_only():
    matrices = random(2, 9, 3)
    mixed = matrices @ random(2, 3, 3, seed=1) * 100
    torch.testing.assert_close(subspace_overlaps(mixed), subspace_overlaps(matrices))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_space_of_fewer_dimensions_that_is_contained(dtype):
    whole = random(9, 3).to(dtype)
    line = (whole[:, :1].double() @ torch.tensor([[1.0, 0.3, -0.7]]).double()).to(dtype)  # of rank 1, but for rounding
    assert subspace_overlaps(torch.stack([whole, line]))[0, 1].item() == pytest.approx(1, abs=1e-3)


def test_orthogonal_spaces():
    axes = torch.eye(6)
    torch.testing.assert_close(subspace_overlaps(torch.stack([axes[:, :3], axes[:, 3:]])), torch.eye(2).double())


def test_a_zero_matrix_has_no_overlap():
    overlaps = subspace_overlaps(torch.stack([torch.eye(3)[:, :2], torch.zeros(3, 2)]))
    assert overlaps.isnan().tolist() == [[False, True], [True, True]]


def test_matrices_with_more_columns_than_rows_span_everything():
    torch.testing.assert_close(subspace_overlaps(random(2, 2, 5)), torch.ones(2, 2).double())
