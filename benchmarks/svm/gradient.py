"""Scores of a batch and their gradient by the inputs, through three routes in torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.svm.contenders import OURS
from benchmarks.svm.worker import Run, repeat_short
from torchdnr.kernels import make_rbf_kernel, rbf_scores

ROUTES = (OURS, "gpytorch", "cdist")
COLUMNS = 10


def prepare_gradient(job: dict[str, Any]) -> Run:
    """Make the batch and the support vectors, in a process of their own.

    Args:
        job: ``route``, ``batch``, ``vectors``, ``d``, ``device``.

    Returns:
        Answers any request with the seconds of forward and backward together.
    """
    device, d, m = job["device"], job["d"], job["vectors"]
    generator, gamma = torch.Generator().manual_seed(0), 0.5 / d
    shapes = (job["batch"], d), (m, d), (m, COLUMNS), (job["batch"], COLUMNS)
    x, v, a, g = (torch.randn(*shape, generator=generator).to(device) for shape in shapes)
    scores = _route(job["route"], v, a, gamma)

    def gradient() -> Tensor:
        inputs = x.detach().requires_grad_()
        return torch.autograd.grad(scores(inputs), inputs, g)[0]

    exact = _exact_gradient(x, v, a, g, gamma)
    fixed = {
        "relative_error": ((gradient() - exact).norm() / exact.norm()).item(),
        "peak_tensor_mib": _peak_tensor_mib(gradient, device),
    }
    return lambda _request: {"seconds": repeat_short(gradient, device), **fixed}


def _route(name: str, vectors: Tensor, coef: Tensor, gamma: float) -> Callable[[Tensor], Tensor]:
    if name == OURS:
        width, center = vectors.new_tensor(gamma), vectors.mean(dim=0)
        return lambda inputs: rbf_scores(inputs, vectors, coef, width, center)
    if name == "gpytorch":
        kernel = make_rbf_kernel(gamma, like=vectors)
        return lambda inputs: kernel(inputs, vectors).to_dense() @ coef
    return lambda inputs: torch.exp(-gamma * torch.cdist(inputs, vectors).square()) @ coef


def _exact_gradient(x: Tensor, v: Tensor, a: Tensor, g: Tensor, gamma: float) -> Tensor:
    """Apply the formula in float64: -2 gamma sum_j w_j (x - v_j) with w = K * (G A')."""
    x, v, a, g = (tensor.double() for tensor in (x, v, a, g))
    products = torch.addmm(v.square().sum(dim=1), x, v.T, alpha=-2.0)
    kernel = torch.exp(-gamma * (products + x.square().sum(dim=1, keepdim=True)))
    weights = kernel * (g @ a.T)
    return -2 * gamma * (weights.sum(dim=1, keepdim=True) * x - weights @ v)


def _peak_tensor_mib(call: Callable[[], object], device: str) -> float:
    """Measure the most memory that the tensors of one call hold at a time."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":  # one per allocation and release, in order of time
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20
