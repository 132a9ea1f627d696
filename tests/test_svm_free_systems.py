"""Systems between free samples, whose factor is corrected for those that left, against numpy."""

import pytest
import torch
from torch import Tensor

import torchdnr.svm.free_systems as free_systems
from torchdnr.svm.free_systems import KEPT_WIDTH, FreeSystems

SIZE = KEPT_WIDTH + 60


def solved(systems: FreeSystems, free: Tensor, right: Tensor) -> Tensor:
    """Solve for right sides ``(p, k, 2)``; 0 where samples are not free."""
    index, weight = systems.choose(free, int(free.sum(dim=1).max()))
    at = index.unsqueeze(2).expand(-1, -1, 2)
    answer, info = systems.solve(right.gather(1, at) * weight.unsqueeze(2), weight)
    assert not info.any()
    return torch.zeros_like(right).scatter_add(1, at, answer)


def expected(kernels: Tensor, damping: Tensor, free: Tensor, right: Tensor) -> Tensor:
    answer = torch.zeros_like(right)
    for k, f in enumerate(free.unbind()):
        matrix = kernels[k].double()[f][:, f] + damping[k] * torch.eye(int(f.sum())).double()
        answer[k, f] = torch.linalg.solve(matrix, right[k, f])
    return answer


@pytest.mark.parametrize("first", [0.7, 0.99, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_leave_and_return(
    first: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(free_systems, "KEPT_WIDTH", 100)
    x = torch.randn(2, SIZE, 10, generator=generator, dtype=torch.float64)
    kernels = torch.exp(-torch.cdist(x, x).square() / 10).to(dtype)
    damping = torch.tensor([0.5, 0.1], dtype=torch.float64)
    right = torch.randn(2, SIZE, 2, generator=generator, dtype=torch.float64)
    chance = torch.rand(2, SIZE, generator=generator)
    made: list[int] = []
    factor = torch.linalg.cholesky_ex

    def counted(matrix: Tensor) -> tuple[Tensor, Tensor]:
        made.append(matrix.shape[1])
        return factor(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    systems = FreeSystems(kernels, damping)
    base = chance < first
    few = base & (torch.arange(SIZE) % torch.tensor([[7], [11]]) > 0)  # more leave in one
    tolerance = 2e-3 if dtype == torch.float32 else 1e-9
    for free, large in ((base, 1), (few, 1), (base, 1), (base & (chance < first / 2), 2)):
        answer = solved(systems, free, right)
        torch.testing.assert_close(
            answer, expected(kernels, damping, free, right), rtol=0, atol=tolerance
        )
        assert sum(width > 150 for width in made) == large
    one = base & (chance < first / 2)
    systems.keep(torch.tensor([1]))
    answer = solved(systems, one[1:] & few[1:], right[1:])
    correct = expected(kernels[1:], damping[1:], one[1:] & few[1:], right[1:])
    torch.testing.assert_close(answer, correct, rtol=0, atol=tolerance)
    assert sum(width > 150 for width in made) == 2  # that of the other problem is not made again
    if first < 1.0:  # a sample that was not there
        solved(systems, torch.ones(1, SIZE, dtype=torch.bool), right[1:])
        assert sum(width > 150 for width in made) == 3
