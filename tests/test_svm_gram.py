"""`KernelRows`: rows on demand are those of the Gram matrix, however few are held."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_examples import up_to
from svm_oracles import check_solution, gram, held, libsvm, noisy

from torchdnr.svm import solve_dual
from torchdnr.svm.gram import distance_rows, rbf_rows
from torchdnr.svm.kernel_rows import KernelRows
from torchdnr.svm.memory_plan import MemoryPlan

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def counting(kernel, capacity, log):
    rows = held(kernel, capacity)
    evaluate = rows._evaluate

    def logged(index):
        log.extend(index.tolist())
        return evaluate(index)

    rows._evaluate = logged
    return rows


@given(seed=st.integers(0, 10_000), capacity=st.sampled_from([7, 12, 29, 30, 99]))
@up_to(40)
def test_any_sequence_of_requests_gets_the_right_rows(seed, capacity):
    kernel = torch.rand(30, 30, generator=torch.Generator().manual_seed(seed))
    log, generator = [], torch.Generator().manual_seed(seed)
    rows = counting(kernel, capacity, log)
    assert rows.store.shape == (min(capacity, 30), 30)
    last = set()
    for _ in range(12):
        count = int(torch.randint(1, 8, (1,), generator=generator))
        index = torch.randint(30, (count,), generator=generator)  # repeats are allowed
        before = len(log)
        slots = rows.slots(index)
        assert torch.equal(rows.store[slots], kernel[index])
        new = log[before:]
        assert len(set(new)) == len(new) and not last & set(new)
        last = set(index.tolist())  # what was used last is held
        assert (rows._slot_of >= 0).sum() <= rows.capacity
        holders = (rows._slot_of >= 0).nonzero().squeeze(1)
        assert torch.equal(rows.store[rows._slot_of[holders]], kernel[holders])
    assert rows.evaluated == len(log)
    if capacity >= 30:
        assert len(set(log)) == len(log)


def test_rows_used_least_recently_give_way():
    log = []
    rows = counting(torch.rand(10, 10), 4, log)
    for index in ([0, 1, 2, 3], [0], [2], [7, 8]):  # 1 and 3 are the oldest
        rows.slots(torch.tensor(index))
    rows.slots(torch.tensor([0, 2, 7, 8]))
    assert log == [0, 1, 2, 3, 7, 8] and rows.evaluated == 6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("capacity", [8, 25, 40])
def test_blocks_hold_the_kernels_between_their_samples(capacity, device):
    kernel = torch.rand(40, 40).to(device)
    rows, index = held(kernel, capacity), torch.tensor([[3, 1, 2], [1, 9, 0], [5, 5, 39]])
    index = index.to(device)
    expected = torch.stack([kernel[i][:, i] for i in index])
    assert torch.equal(rows.block(index), expected)
    assert torch.equal(KernelRows.dense(kernel).block(index), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("capacity", [10, 45, 60])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.4, 1.0])
def test_products_are_exact_whichever_rows_are_held(share, capacity, dtype, device):
    generator = torch.Generator().manual_seed(1)
    kernel = gram(torch.randn(60, 4, generator=generator), 0.5).to(device, dtype)
    vectors = torch.randn(3, 60, generator=generator, dtype=torch.float64)
    vectors *= torch.rand(60, generator=generator) < share
    vectors = vectors.to(device)
    expected = vectors @ kernel.double()
    for rows in (held(kernel, capacity), KernelRows.dense(kernel)):
        rows.exact_elements = 60 * 7  # more than one part
        for index in (range(0), range(0, 60, 9), range(capacity)):
            rows.slots(torch.tensor(list(index), dtype=torch.int64, device=device))
            product = rows.product(vectors)
            torch.testing.assert_close(product, expected, rtol=0, atol=1e-13)
            rough = rows.product(vectors, exact=False)
            torch.testing.assert_close(rough, expected, rtol=0, atol=2e-5)
        assert rows.product(vectors).dtype == torch.float64


def test_rows_evaluated_for_a_product_are_counted_and_not_kept():
    log = []
    rows = counting(torch.rand(20, 20), 5, log)
    rows.slots(torch.arange(5))
    rows.product(torch.ones(1, 20, dtype=torch.float64))
    assert rows.evaluated == len(log) > 5
    assert (rows._slot_of >= 0).nonzero().squeeze(1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_of_features_and_of_distances_are_the_gram_matrix(dtype, device):
    x = noisy(n=70)[0].to(device, dtype) * 3 + 5
    x[1] = x[0]
    expected = torch.exp(-0.3 * torch.cdist(x.double(), x.double()).square())
    index = torch.tensor([5, 0, 1, 69], device=device)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    distances = exact_distances(x)
    for rows in (rbf_rows(x, 0.3, x.mean(0)), distance_rows(distances, 0.3)):
        got = rows.store[rows.slots(index)]
        assert got.dtype == dtype and rows.evaluated == 4
        torch.testing.assert_close(got.double(), expected[index], rtol=0, atol=tolerance)
        assert (got.gather(1, index.unsqueeze(1)) == 1).all() and (got <= 1).all()
    assert torch.equal(distances, exact_distances(x))  # left alone


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_within_sets_are_computed_without_rows_where_few_are_held(dtype, device):
    x = noisy(n=70)[0].to(device, dtype) * 3 + 5
    x[1] = x[0]
    expected = torch.exp(-0.3 * torch.cdist(x.double(), x.double()).square())
    rows = rbf_rows(x, 0.3, x.mean(0), MemoryPlan(20, 40))
    index = torch.tensor([[5, 0, 1, 69], [1, 1, 0, 2]], device=device)  # padding repeats samples
    index = index.repeat(1, 10)  # in more than one part
    got = rows.block(index)
    assert rows.evaluated == 0 and got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    within = torch.stack([expected[i][:, i] for i in index])
    torch.testing.assert_close(got.double(), within, rtol=0, atol=tolerance)
    assert (got.diagonal(dim1=1, dim2=2) == 1).all() and (got <= 1).all()


@pytest.mark.parametrize("plan", [(300, 300), (120, 200), (60, 50), (20, 90)])
def test_fits_with_more_free_samples_than_a_set_or_the_rows_hold(plan):
    x, y = noisy(n=300)
    expected, _ = libsvm(gram(x, 1.0).numpy(), y[:, 0].numpy(), 50.0)
    solution = solve_dual(rbf_rows(x, 1.0, x.mean(0), MemoryPlan(*plan)), y, 50.0, tol=1e-4)
    check_solution(gram(x, 1.0), y, 50.0, solution, 1e-4)
    inner = (solution.dual_coef != 0) & (solution.dual_coef.abs() < 50.0)
    assert inner.sum() > 100
    assert solution.objective[0] <= expected + 1e-6 * abs(expected)


def exact_distances(x):
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("problems", [1, 12])
def test_rows_on_demand_give_the_solution_of_the_whole_matrix(problems, device):
    x = noisy(n=400)[0].to(device)
    targets = torch.cat([noisy(n=400, seed=0, noise=0.02 * k)[1] for k in range(problems)], dim=1)
    targets, kernel = targets.to(device), gram(x, 0.2)
    dense = solve_dual(kernel, targets, 1.0)
    rows = rbf_rows(x, 0.2, x.mean(0))
    demanded = solve_dual(rows, targets, 1.0)
    check_solution(kernel, targets, 1.0, demanded)
    torch.testing.assert_close(demanded.objective, dense.objective, rtol=1e-9, atol=0)
    assert dense.kernel_rows == 400 and demanded.kernel_rows == rows.evaluated <= 400
    again = solve_dual(rbf_rows(x, 0.2, x.mean(0)), targets, 1.0)
    assert torch.equal(again.dual_coef, demanded.dual_coef)


def test_few_rows_are_evaluated_where_few_samples_matter():
    x, targets = noisy(n=1500, noise=0.0)
    rows = rbf_rows(x, 0.1, x.mean(0))
    solution = solve_dual(rows, targets, 1.0)
    check_solution(gram(x, 0.1), targets, 1.0, solution)
    assert solution.kernel_rows < 1200


@pytest.mark.parametrize(
    ("n", "capacity", "problems", "C"),
    [
        pytest.param(300, 40, 1, 10.0, marks=pytest.mark.slow),
        (300, 40, 3, 1.0),
        (1500, 100, 1, 0.3),
    ],
)
def test_few_rows_held_give_the_optimum_all_the_same(n, capacity, problems, C):
    x, _ = noisy(n=n)
    targets = torch.cat([noisy(n=n, noise=0.05, seed=0)[1]] * problems, dim=1)
    targets[:, 1:] *= -1
    kernel, log = gram(x, 0.1), []
    rows = counting(kernel, capacity, log)
    solution = solve_dual(rows, targets, C)
    check_solution(kernel, targets, C, solution)
    assert len(rows.store) == capacity and (rows._slot_of >= 0).sum() <= capacity
    assert solution.kernel_rows == len(log) > capacity
    best = solve_dual(kernel, targets, C).objective
    torch.testing.assert_close(solution.objective, best, rtol=1e-4, atol=0)
    other = solve_dual(held(kernel, capacity), targets, C)
    assert torch.equal(other.dual_coef, solution.dual_coef)
