"""Fewer support vectors: replace those of an `RBFSVM` by a few prototypes with the same scores.

The reduced-set problem. With f(z) = sum_j alpha_j k(z, s_j) the score of a class without its
intercept, prototypes p_i with coefficients beta_i minimise, over all classes,

    mean over the features of ||g - f||^2  +  smoothness * ||g - f||^2 in the space of the kernel,

g the sum over the prototypes. The second term holds the scores away from the features, where
attacks go: it bounds their difference everywhere (`score_bound`). Intercepts, center and kernel
stay as they are, and so do the scores far from all data and what a margin of 1 means.

The SVMs of a stack are compressed one after the other; then the prototypes of all move together,
on the scores of the last one.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from torchdnr.arrays import as_features
from torchdnr.kernels.any_kernel import kernel_matrix, kernel_scores
from torchdnr.kernels.rbf import BLOCK_ELEMENTS
from torchdnr.svm.checks import checked_features
from torchdnr.svm.rbf_svm import RBFSVM

SMOOTHNESS = 1e-3
"""Weight of the difference in the space of the kernel, against that at the features."""
STEPS = 100
"""Iterations of L-BFGS on the positions of the prototypes."""
ANCHOR = 0.1
"""Weight of what each SVM of a stack loses by itself, against what the final scores lose."""
WARN_BELOW = 0.99
"""Least R^2 of the final scores, and least share of labels kept, without a warning."""
_RIDGE = 1e-10  # of the mean diagonal: two prototypes may come to lie on one another
_NO_RESIDUAL = 1e-10  # of k(s, s): such a vector lies in the span of those chosen


@dataclass(frozen=True)
class KernelSum:
    """Scores without intercept, ``sum_j coefficients_j k(z, vectors_j)``, in float64."""

    kernel: Kernel
    vectors: Tensor
    coefficients: Tensor
    center: Tensor
    block_elements: int = BLOCK_ELEMENTS

    @classmethod
    def of(cls, svm: "RBFSVM") -> "KernelSum":
        """Copy what an SVM scores with."""
        tensors = (svm.support_vectors, svm.dual_coef, svm.center)
        kernel = deepcopy(cast(Kernel, svm.kernel)).double().requires_grad_(False)
        vectors, coefficients, center = (tensor.detach().double() for tensor in tensors)
        return cls(kernel, vectors, coefficients, center)

    @property
    def block_rows(self) -> int:
        """Rows of features in a block, whose matrices have ``block_elements`` at the most."""
        return max(1, self.block_elements // sum(self.vectors.shape))

    def matrix(self, inputs: Tensor, vectors: Tensor) -> Tensor:
        """Evaluate the kernel, ``(n, m)``."""
        return kernel_matrix(self.kernel, inputs, vectors, self.center)

    def scores(self, inputs: Tensor, vectors: Tensor, coefficients: Tensor) -> Tensor:
        """Sum the kernel over other vectors."""
        return kernel_scores(self.kernel, inputs, vectors, coefficients, self.center)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Score inputs ``(n, d)`` in float64."""
        return self.scores(inputs, self.vectors, self.coefficients)

    def distance(self, vectors: Tensor, coefficients: Tensor) -> Tensor:
        """Compute half of ||g - f||^2 but for its constant part, g the sum over ``vectors``."""
        scores = self.scores(vectors, vectors, coefficients)
        return (coefficients * (scores / 2 - self(vectors))).sum()


def greedy_choice(target: KernelSum, count: int) -> Tensor:
    """Choose support vectors one by one, each the best to add in the space of the kernel.

    Returns their indices, int64 ``(count,)``, in the order of the choice.
    """
    vectors = target.vectors
    diagonal = torch.cat([target.kernel(v, v, diag=True) for v in vectors.split(1024)])
    floor = _NO_RESIDUAL * diagonal
    power, residual = diagonal.clone(), target(vectors)  # ||residual of k(s, .)||^2; that of f
    basis = vectors.new_zeros(len(vectors), count)  # Newton's: orthonormal in that space
    chosen = torch.zeros(count, dtype=torch.int64, device=vectors.device)
    free = torch.ones(len(vectors), dtype=torch.bool, device=vectors.device)
    for k in range(count):
        gain = residual.square().sum(dim=1) / power.maximum(floor)
        gain = torch.where(power > floor, gain, 0.0)
        index = torch.where(free, gain, -1.0).argmax().unsqueeze(0)  # stays on the device
        scale = power[index].maximum(floor[index]).sqrt()
        column = target.matrix(vectors, vectors[index]).squeeze(1)
        new = (column - basis[:, :k] @ basis[index, :k].squeeze(0)) / scale
        residual = residual - torch.outer(new, (residual[index] / scale).squeeze(0))
        power = power - new.square()
        basis[:, k], chosen[k : k + 1], free[index] = new, index, False
    return chosen


def _spread(values: Tensor) -> Tensor:
    """Sum the variances of columns, 1 where there is none: losses and stops are relative to it."""
    spread = values.double().var(dim=0, correction=0).sum()
    return torch.where(spread > 0.0, spread, 1.0)


class ReducedSet:
    """The least-squares problem of the prototypes: ``values`` ``(n, P)`` at ``features``."""

    def __init__(
        self, target: KernelSum, features: Tensor, values: Tensor, smoothness: float
    ) -> None:
        self.target, self.smoothness = target, smoothness
        self.features, self.values = features.detach(), values.detach()
        self.scale = _spread(self.values)

    def _blocks(self) -> list[tuple[Tensor, Tensor]]:
        rows = self.target.block_rows
        return list(zip(self.features.split(rows), self.values.split(rows), strict=True))

    @torch.no_grad()
    def coefficients(self, prototypes: Tensor) -> Tensor:
        """Solve for the best coefficients of given prototypes, ``(p, P)``."""
        n = len(self.features)
        matrix = self.smoothness * self.target.matrix(prototypes, prototypes)
        right = self.smoothness * self.target(prototypes)
        for features, values in self._blocks():
            kernel = self.target.matrix(features.double(), prototypes)
            matrix.addmm_(kernel.T, kernel, alpha=1.0 / n)
            right.addmm_(kernel.T, values.double(), alpha=1.0 / n)
        matrix.diagonal().add_(_RIDGE * matrix.diagonal().mean())
        return torch.linalg.solve(matrix, right)

    def loss(self, prototypes: Tensor) -> Tensor:
        """Evaluate the objective at its best coefficients, and add its gradient to ``.grad``.

        There the derivative by the coefficients is zero: that by the prototypes is what it is with
        the coefficients held. The constant part of the norm is left out.
        """
        coefficients = self.coefficients(prototypes)
        part = 2 * self.smoothness * self.target.distance(prototypes, coefficients) / self.scale
        part.backward()
        total, n = part.detach(), len(self.features)
        for features, values in self._blocks():
            scores = self.target.scores(features.double(), prototypes, coefficients)
            part = (scores - values).square().sum() / (n * self.scale)
            part.backward()
            total = total + part.detach()
        return total


@torch.enable_grad()
def minimise(
    start: Sequence[Tensor], loss: Callable[[list[Tensor]], Tensor], steps: int
) -> list[Tensor]:
    """Minimise by L-BFGS and return the best point that was seen, the start included.

    ``loss`` evaluates the objective and adds its gradient to ``.grad`` of the tensors.
    """
    best = [t.detach().clone(memory_format=torch.contiguous_format) for t in start]
    tensors, lowest = [tensor.clone().requires_grad_() for tensor in best], torch.inf

    def closure() -> Tensor:
        nonlocal best, lowest
        for tensor in tensors:
            tensor.grad = None
        value = loss(tensors)
        reached = value.item()  # stalls a GPU, as L-BFGS does for its line search anyway
        parts = [value, *(tensor.grad for tensor in tensors if tensor.grad is not None)]
        if lowest == torch.inf and not all(torch.isfinite(part).all() for part in parts):
            raise ValueError(
                "the scores have no finite gradient by the support vectors, so that prototypes "
                "cannot be moved: use another kernel, or steps=0, which leaves them at their start"
            )
        if reached < lowest:
            best, lowest = [tensor.detach().clone() for tensor in tensors], reached
        return value

    if steps > 0:
        torch.optim.LBFGS(
            tensors,
            max_iter=steps,
            tolerance_grad=1e-9,
            tolerance_change=1e-10,
            history_size=20,
            line_search_fn="strong_wolfe",
        ).step(closure)
    return best


@torch.inference_mode(False)
@torch.no_grad()
def compress_svm(
    svm: RBFSVM,
    features: Tensor,
    prototypes: int,
    *,
    targets: Tensor | None = None,
    steps: int = STEPS,
    smoothness: float = SMOOTHNESS,
) -> RBFSVM:
    """Replace the support vectors of a fitted SVM by fewer prototypes.

    They start at support vectors, chosen greedily: each time the one whose addition brings the
    sum nearest to the scores in the space of the kernel. Their coefficients always are the
    minimum, in closed form; their positions descend by L-BFGS, of which the best point is kept.
    Nothing is random. All is done in float64; beyond copies of the support vectors, memory is
    bounded: features are taken block by block.

    Args:
        svm: The fitted SVM, which is left as it is; any kernel but a precomputed one.
        features: Where the scores are compared, such as the training features, ``(n, d)``.
        prototypes: How many, 1..m.
        targets: Decision values wanted at the features, ``(n, P)``; None: those of ``svm``. In a
            stack the features may come from compressed SVMs and the targets from the original ones.
        steps: Iterations of L-BFGS, >= 0; 0 leaves the prototypes at support vectors.
        smoothness: Weight > 0 of the difference in the space of the kernel.

    Returns:
        A new SVM with the prototypes as ``support_vectors``. Its ``dual_coef`` are plain
        coefficients, which no C bounds; ``support`` is -1 and ``solution`` None: prototypes are no
        training samples, and no certificate of the dual problem holds for them.

    Source: Burges, "Simplified support vector decision rules", ICML (1996); the greedy choice is
    the f/P-greedy one of Wirtz and Haasdonk, "A vectorial kernel orthogonal greedy algorithm",
    Dolomites Research Notes on Approximation 6 (2013).
    """
    features = as_features("features", features)
    _check(svm, features, prototypes, targets, steps, smoothness)
    target = KernelSum.of(svm)
    if targets is None:
        blocks = features.split(target.block_rows)
        targets = torch.cat([svm(block, vote=False) for block in blocks])
    problem = ReducedSet(target, features, targets - svm.intercept, smoothness)
    start = target.vectors[greedy_choice(target, prototypes)]
    (vectors,) = minimise([start], lambda tensors: problem.loss(tensors[0]), steps)
    return with_prototypes(svm, vectors, problem.coefficients(vectors))


def _check(
    svm: RBFSVM,
    features: Tensor,
    prototypes: int,
    targets: Tensor | None,
    steps: int,
    smoothness: float,
) -> None:
    svm._require_fit()
    if svm.is_precomputed:
        raise ValueError(
            "compression moves support vectors, and with a precomputed kernel there are none to "
            "move: fit the SVM on features, with the RBF or a kernel of gpytorch"
        )
    checked_features(features)
    if features.shape[1] != svm.center.numel():
        raise ValueError(
            f"features must be (n, {svm.center.numel()}) as in fit, got {tuple(features.shape)}"
        )
    m = len(svm.support_vectors)
    if isinstance(prototypes, bool) or not isinstance(prototypes, int) or not 1 <= prototypes <= m:
        raise ValueError(
            f"prototypes must be an integer in 1..{m}, the number of support vectors, "
            f"got {prototypes!r}"
        )
    shape = len(features), svm.intercept.numel()
    if targets is not None and targets.shape != shape:
        raise ValueError(f"targets must be {shape}, got {tuple(targets.shape)}")
    if steps < 0 or not 0.0 < smoothness < torch.inf:
        raise ValueError(
            "expected steps >= 0 and smoothness > 0 and finite, "
            f"got steps={steps} and smoothness={smoothness}"
        )


def with_prototypes(svm: RBFSVM, prototypes: Tensor, coefficients: Tensor) -> RBFSVM:
    """Copy an SVM with prototypes ``(p, d)`` in the place of its support vectors, uncertified."""
    kernel = deepcopy(svm.kernel)
    new = RBFSVM(**{**svm.settings(), "kernel": kernel if svm.has_own_kernel else None})
    new.kernel = kernel
    new.support_vectors = prototypes.detach().to(svm.support_vectors)
    new.support = torch.full_like(svm.support[:1], -1).repeat(len(prototypes))
    new.dual_coef = coefficients.detach().to(svm.dual_coef)
    new.intercept, new.center = svm.intercept.clone(), svm.center.clone()
    return new.train(svm.training)


@torch.no_grad()
def score_bound(svm: RBFSVM, compressed: RBFSVM) -> Tensor:
    """Bound how much the decision values of two SVMs of one kernel differ anywhere, ``(P,)``.

    By Cauchy and Schwarz it is at most the norm of the difference in the space of the kernel, times
    sqrt(k(z, z)), and that is the same for all z where the kernel is stationary; elsewhere the
    bound is infinite.
    """
    one, two = KernelSum.of(svm), KernelSum.of(compressed)
    probe = one.vectors[:8]
    if not torch.equal(one.matrix(probe, probe), two.matrix(probe, probe)):
        raise ValueError("expected two SVMs of the same kernel and width, got others")
    shift = (svm.intercept - compressed.intercept).double().abs()
    if not one.kernel.is_stationary:
        return torch.full_like(shift, torch.inf)
    vectors = torch.cat([one.vectors, two.vectors])
    coefficients = torch.cat([one.coefficients, -two.coefficients])
    squares = (coefficients * one.scores(vectors, vectors, coefficients)).sum(dim=0)
    largest = one.kernel(probe[:1], probe[:1], diag=True)
    return shift + (squares.clamp_min(0.0) * largest).sqrt()


def stack_scores(
    svms: Mapping[str, Callable[[Tensor], Tensor]], features: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Score features by every SVM of a stack, ``(n, c)``, the final ones last."""
    scores = {name: svms[name](values) for name, values in features.items()}
    for name in svms:
        if name not in features:
            scores[name] = svms[name](torch.cat(list(scores.values()), dim=1))
    return scores


class JointProblem:
    """Least squares on the final scores, each SVM anchored at what it was to return by itself.

    It starts at the ``compressed`` stack, whose SVMs in ``names`` move; ``wanted`` are the scores
    of ``svms``. ``tensors`` are prototypes and coefficients of the SVMs that move, to begin with.
    """

    def __init__(
        self,
        svms: Mapping[str, RBFSVM],
        compressed: Mapping[str, RBFSVM],
        features: Mapping[str, Tensor],
        wanted: Mapping[str, Tensor],
        names: Sequence[str],
        smoothness: float,
    ) -> None:
        self.targets = {name: KernelSum.of(svm) for name, svm in svms.items()}
        self.start = {name: KernelSum.of(svm) for name, svm in compressed.items()}
        self.intercepts = {name: svm.intercept.double() for name, svm in svms.items()}
        self.features, self.wanted, self.names = features, wanted, list(names)
        starts = [self.start[name] for name in names]
        self.tensors = [t for start in starts for t in (start.vectors, start.coefficients)]
        self.smoothness = smoothness
        self.final = list(svms)[-1]
        self.scale = {name: _spread(values) for name, values in wanted.items()}

    def pairs(self, tensors: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return prototypes and coefficients of the SVMs that move, by name."""
        return dict(zip(self.names, zip(tensors[::2], tensors[1::2], strict=True), strict=True))

    def loss(self, tensors: Sequence[Tensor]) -> Tensor:
        """Evaluate the objective, and add its gradient to ``.grad`` of the tensors."""
        moved, total = self.pairs(tensors), torch.zeros_like(self.scale[self.final])
        for name, pair in moved.items():
            part = 2 * self.smoothness * self.targets[name].distance(*pair) / self.scale[name]
            (ANCHOR * part).backward()
            total = total + ANCHOR * part.detach()
        scorers = {
            name: partial(self._score, name, moved.get(name, (fixed.vectors, fixed.coefficients)))
            for name, fixed in self.start.items()
        }
        count = len(self.wanted[self.final])
        rows = min(target.block_rows for target in self.targets.values())
        for top in range(0, count, rows):
            block = slice(top, top + rows)
            inputs = {name: z[block].double() for name, z in self.features.items()}
            part = torch.zeros_like(total)
            for name, scores in stack_scores(scorers, inputs).items():
                error = (scores - self.wanted[name][block]).square().sum() / self.scale[name]
                part = part + (1.0 if name == self.final else ANCHOR) * error / count
            part.backward()
            total = total + part.detach()
        return total

    def _score(self, name: str, pair: tuple[Tensor, Tensor], inputs: Tensor) -> Tensor:
        return self.targets[name].scores(inputs, *pair) + self.intercepts[name]


class CompressionWarning(UserWarning):
    """A compressed classifier scores visibly unlike the one it stands for."""


@torch.no_grad()
def compress_stack(
    svms: Mapping[str, RBFSVM],
    features: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    *,
    steps: int,
    joint_steps: int,
    smoothness: float,
) -> dict[str, RBFSVM]:
    """Compress the SVMs of a stack one after the other, then fine-tune them on the final scores.

    The combiner learns to give the original scores on what the compressed SVMs return. An SVM
    without an entry in ``sizes`` stays as it is.
    """
    wanted = stack_scores(svms, features)
    compressed: dict[str, RBFSVM] = {}
    for name, svm in svms.items():
        inputs = features.get(name)
        if inputs is None:
            inputs = torch.cat([compressed[layer](z) for layer, z in features.items()], dim=1)
        if name not in sizes:
            compressed[name] = deepcopy(svm)
            continue
        targets = wanted[name]
        compressed[name] = compress_svm(
            svm, inputs, sizes[name], targets=targets, steps=steps, smoothness=smoothness
        )
    if len(svms) > len(features):
        problem = JointProblem(svms, compressed, features, wanted, list(sizes), smoothness)
        pairs = problem.pairs(minimise(problem.tensors, problem.loss, joint_steps))
        compressed |= {name: with_prototypes(compressed[name], *pairs[name]) for name in pairs}
    return compressed


@torch.no_grad()
def stack_losses(
    svms: Mapping[str, RBFSVM],
    compressed: Mapping[str, RBFSVM],
    features: Mapping[str, Tensor],
) -> dict[str, dict[str, Any]]:
    """Measure what a compressed stack has lost, SVM by SVM.

    Each SVM is measured in its stack: the combiner on what the SVMs before it return, so that the
    last entry is about the final scores.

    Returns:
        By SVM, as JSON values: ``support_vectors`` and ``prototypes`` in their place; ``r2`` of the
        scores and their ``largest_difference``; ``label_agreement``, the share of inputs whose
        largest score is that of the same class; ``score_bound``: no features whatever, given to
        both of this SVM alone, let their scores differ more.
    """
    before, after = stack_scores(svms, features), stack_scores(compressed, features)
    losses = {}
    for name, scores in before.items():
        wanted, given = scores.double(), after[name].double()
        spread = (wanted - wanted.mean(dim=0)).square().sum().clamp_min(1e-300)
        losses[name] = {
            "support_vectors": len(svms[name].support_vectors),
            "prototypes": len(compressed[name].support_vectors),
            "r2": (1 - (given - wanted).square().sum() / spread).item(),
            "largest_difference": (given - wanted).abs().max().item(),
            "label_agreement": (wanted.argmax(1) == given.argmax(1)).double().mean().item(),
            "score_bound": score_bound(svms[name], compressed[name]).max().item(),
        }
    return losses


class _Compressed(Protocol):
    """A classifier whose ``selection`` has an entry ``compression`` for each of its SVMs."""

    @property
    def selection(self) -> dict[str, dict[str, Any]]: ...


def compression_report(model: _Compressed) -> str:
    """Format what a compressed classifier has lost on the images it was compressed with.

    Args:
        model: What ``compress`` returned, also after ``load``.

    Returns:
        A table with a row per SVM, each measured in its stack; the last row is the final scores.

    Raises:
        ValueError: If the classifier is not a compressed one.
    """
    entries: dict[str, Any] = {
        name: chosen.get("compression") for name, chosen in model.selection.items()
    }
    if not entries or None in entries.values():
        raise ValueError("this classifier is not compressed: call compress(images, ...) first")
    lines = [
        f"{'SVM':<16} {'vectors':>15} {'R^2':>8} {'largest difference':>19} "
        f"{'anywhere at most':>17} {'same label':>11}"
    ]
    for name, entry in entries.items():
        vectors = f"{entry['support_vectors']} -> {entry['prototypes']}"
        lines.append(
            f"{name:<16} {vectors:>15} {entry['r2']:>8.4f} {entry['largest_difference']:>19.3g} "
            f"{entry['score_bound']:>17.3g} {entry['label_agreement']:>11.1%}"
        )
    return "\n".join(lines)
