"""Problems for the dual solver, and what it is compared with; nothing here uses the solver."""

import numpy as np
import torch
from sklearn.svm import SVC

from torchdnr.kernels import squared_distances
from torchdnr.svm.kernel_rows import KernelRows
from torchdnr.svm.memory_plan import MemoryPlan


def gram(features, gamma):
    return torch.exp(-gamma * squared_distances(features, features, features.mean(0)))


def noisy(n=80, d=5, seed=0, noise=0.25):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = (x[:, 0] + x[:, 1] ** 2 > 0.7).double() * 2 - 1
    flip = torch.rand(n, generator=generator) < noise
    y = torch.where(flip, -y, y)
    y[:2] = torch.tensor([1.0, -1.0])
    return x, y.unsqueeze(1)


def held(kernel, capacity):
    """Serve a Gram matrix as rows on demand, of which few are held."""
    plan = MemoryPlan(capacity, capacity)
    return KernelRows(lambda index: kernel[index], len(kernel), kernel, plan)


def libsvm(kernel, target, C, tol=1e-6):
    """Return LIBSVM's objective and its decision values; C may differ by sample."""
    svc = SVC(C=1.0, kernel="precomputed", tol=tol)
    svc.fit(kernel, target, sample_weight=np.broadcast_to(C, len(target)).astype(float))
    coef = np.zeros(len(target))
    coef[svc.support_] = svc.dual_coef_[0]
    objective = 0.5 * coef @ kernel @ coef - np.abs(coef).sum()
    return objective, svc.decision_function(kernel)


def check_solution(kernel, targets, C, solution, tol=1e-3):
    """Recompute feasibility and optimality in float64 from b alone, column by column."""
    kernel, coefs, targets = (t.cpu().double() for t in (kernel, solution.dual_coef, targets))
    limits = torch.as_tensor(C, dtype=torch.float64).cpu().expand(targets.shape)
    assert solution.converged.all()
    for column in range(targets.shape[1]):
        b, y, limit = coefs[:, column], targets[:, column], limits[:, column]
        alpha, product = y * b, kernel @ b
        assert ((alpha >= 0) & (alpha <= limit)).all()  # exactly
        assert abs(b.sum()) <= 1e-9 * limit.max()
        level = y - product
        can_grow = torch.where(y > 0, alpha < limit, alpha > 0)
        can_shrink = torch.where(y > 0, alpha > 0, alpha < limit)
        up, down = level[can_grow].max(), level[can_shrink].min()
        size = 1.0 + kernel.abs().max() * b.abs().sum()  # rounding is relative to the terms
        slack = 1e-13 * size.item()
        assert up - down <= tol + slack
        reported = solution.violation[column].item()
        assert abs(reported - max((up - down).item(), 0.0)) <= slack
        intercept = solution.intercept[column].item()
        assert min(up, down) - slack <= intercept <= max(up, down) + slack
        scores = solution.scores[:, column].cpu()
        assert (scores - product - intercept).abs().max() <= slack
        dual = b @ product / 2 - y @ b
        assert abs(solution.objective[column].item() - dual.item()) <= slack * (1 + b.abs().sum())
        gap = b @ product / 2 + limit @ (1 - y * scores).clamp_min(0) + dual
        rounding = slack * (1 + b.abs().sum() + limit.sum()).item()
        assert abs(solution.duality_gap[column].item() - gap.item()) <= rounding
        # Each sample costs at most its C times the violation: optimal, by weak duality.
        assert -rounding <= gap <= limit.sum() * tol + rounding
