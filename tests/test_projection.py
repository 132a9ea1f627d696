import math

import pytest
import torch

from torchdnr.features.reductions import projection_distortion, random_rows, sparse_projection


def dense(rows, size):
    """Build the matrix of a projection, entry by entry."""
    matrix = torch.zeros(rows.shape[1], size, dtype=torch.float64)
    for block in rows.tolist():
        for value, row in enumerate(block):
            matrix[value, row % size] += (1 if row < size else -1) / math.sqrt(len(rows))
    return matrix


@pytest.mark.parametrize("size", [8, 6, 7, 1])
def test_it_is_the_product_with_a_sparse_matrix_of_unit_rows(size):
    rows = random_rows(50, size, seed=3)
    blocks = math.gcd(size, 4)
    assert rows.shape == (blocks, 50)
    matrix = dense(rows, size)
    torch.testing.assert_close(matrix.norm(dim=1), torch.ones(50, dtype=torch.float64))
    parts = matrix.view(50, blocks, size // blocks)
    assert ((parts != 0).sum(2) == 1).all()  # one entry in each block
    inputs = torch.randn(4, 50, dtype=torch.float64)
    torch.testing.assert_close(sparse_projection(inputs, rows, size), inputs @ matrix)


def test_squared_distances_are_kept_in_expectation_with_the_variance_of_the_theory():
    generator = torch.Generator().manual_seed(0)
    size = 16
    # All values alike, and few values that differ: the easy and the hard inputs.
    flat, peaked = torch.rand(300, generator=generator).double(), torch.zeros(300).double()
    peaked[:2] = torch.tensor([3.0, -1.0])
    for inputs in (flat, peaked):
        squares = (
            torch.stack(
                [
                    sparse_projection(inputs[None], random_rows(300, size, seed), size)
                    .square()
                    .sum()
                    for seed in range(2000)
                ]
            )
            / inputs.square().sum()
        )
        assert squares.mean().item() == pytest.approx(1, abs=0.04)
        assert squares.std() < 1.1 * math.sqrt(2 / size)


def test_same_seed_same_projection_and_the_random_state_stays():
    state = torch.get_rng_state()
    first, again, other = (random_rows(1000, 32, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    counts = torch.bincount(first.flatten(), minlength=64)
    assert counts.min() > 30 and counts.max() < 110  # about 62 each


def test_gradients_are_exact_and_rows_are_alone_in_their_batch():
    rows = random_rows(40, 8, seed=0)
    inputs = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sparse_projection(x, rows, 8), inputs)
    assert torch.autograd.gradgradcheck(lambda x: sparse_projection(x, rows, 8).square(), inputs)
    together = sparse_projection(inputs, rows, 8)
    alone = torch.cat([sparse_projection(row[None], rows, 8) for row in inputs])
    assert torch.equal(alone, together)
    assert sparse_projection(inputs[:0], rows, 8).shape == (0, 8)


def test_half_precision_is_summed_in_float32():
    rows = random_rows(20_000, 4, seed=0)
    inputs = torch.rand(2, 20_000).bfloat16()
    found = sparse_projection(inputs, rows, 4)
    assert found.dtype == torch.float32
    expected = sparse_projection(inputs.double(), rows, 4)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-2)


def test_distortion_against_a_loop_over_pairs():
    inputs, projected = torch.randn(6, 30), torch.randn(6, 5)
    inputs[1] = inputs[0]  # no distance, no error
    errors = [
        (projected[i] - projected[j]).norm().item() / (inputs[i] - inputs[j]).norm().item() - 1
        for i in range(6)
        for j in range(i)
        if (i, j) != (1, 0)
    ]
    found = projection_distortion(inputs, projected)
    assert found["pairs"] == len(errors) == 14
    assert found["rms"] == pytest.approx(math.sqrt(sum(e**2 for e in errors) / 14), rel=1e-4)
    assert found["max"] == pytest.approx(max(map(abs, errors)), rel=1e-4)
    assert projection_distortion(inputs[:2], projected[:2]) is None
    assert projection_distortion(inputs[:1], projected[:1]) is None
