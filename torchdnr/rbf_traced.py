"""Sums of RBF kernels as one plain formula, for `torch.compile` and `torch.export`."""

from collections.abc import Callable

import torch
from torch import Tensor

from torchdnr.rbf import full_precision


def traced_rbf_scores(
    inputs: Tensor, vectors: Tensor, coefficients: Tensor, gamma: Tensor, center: Tensor
) -> Tensor:
    """Compute what ``rbf_scores`` computes, in operations that a compiler can see and join.

    The kernel is taken whole, ``(n, m)``: a number of rows that is only known when the program
    runs cannot be cut into tiles.

    Args:
        inputs: Features, ``(n, d)``.
        vectors: Support vectors, ``(m, d)``.
        coefficients: One column of dual coefficients per class, ``(m, c)``.
        gamma: Kernel width, a scalar tensor > 0.
        center: Mean of the training features, ``(d,)``.

    Returns:
        Sums without intercept, ``(n, c)``.
    """
    if torch.compiler.is_exporting():
        return _scores(inputs - center, vectors - center, coefficients, gamma, torch.matmul)
    with torch.autocast(inputs.device.type, enabled=False):
        z, s = inputs - center, vectors - center
        return _scores(z, s, coefficients, gamma, full_precision_product)


def _scores(
    z: Tensor,
    s: Tensor,
    coefficients: Tensor,
    gamma: Tensor,
    product: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    norms = z.square().sum(dim=1, keepdim=True) + s.square().sum(dim=1)
    distances = (norms - 2.0 * product(z, s.T)).clamp_min(0.0)
    return product((-gamma * distances).exp(), coefficients)


@torch.library.custom_op("torchdnr::full_precision_product", mutates_args=())
def full_precision_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply two matrices without TF32 or bfloat16, whatever the global switch says.

    A compiler leaves it as it is: the switch is looked at when the program runs. An exported
    program, which has to run without this package, holds plain products instead.

    Args:
        left: ``(n, k)``.
        right: ``(k, m)``.

    Returns:
        ``(n, m)``.
    """
    with full_precision(left.device):
        return left @ right


@full_precision_product.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


def _keep(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    left, right = ctx.saved_tensors
    by_left, by_right = ctx.needs_input_grad
    return (
        full_precision_product(grad, right.T) if by_left else None,
        full_precision_product(left.T, grad) if by_right else None,
    )


full_precision_product.register_autograd(_gradients, setup_context=_keep)
