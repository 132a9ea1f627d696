"""A stack of SVMs whose prototypes and coefficients move together, on what the last one returns."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from torchdnr.svm.compression import with_prototypes
from torchdnr.svm.rbf_svm import RBFSVM
from torchdnr.svm.reduced_set import KernelSum, minimise

ANCHOR = 0.1
"""Weight of what each SVM loses by itself, against what the final scores lose."""


def stack_scores(
    svms: Mapping[str, Callable[[Tensor], Tensor]], features: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Score features by every SVM of a stack.

    Args:
        svms: By layer, and under another name the combiner, if there is one.
        features: By layer, ``(n, d)``.

    Returns:
        Scores by SVM, ``(n, c)``, the final ones last.
    """
    scores = {name: svms[name](values) for name, values in features.items()}
    for name in svms:
        if name not in features:
            scores[name] = svms[name](torch.cat(list(scores.values()), dim=1))
    return scores


class JointProblem:
    """Least squares on the final scores, each SVM anchored at what it was to return by itself.

    Args:
        svms: The stack to replace.
        compressed: The stack to begin with.
        features: By layer, ``(n, d)``.
        wanted: Scores of ``svms`` by name.
        names: The SVMs whose prototypes move.
        smoothness: Weight of the difference in the space of the kernel.
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
        self.smoothness = smoothness
        self.final = list(svms)[-1]
        spreads = {n: w.double().var(dim=0, correction=0).sum() for n, w in wanted.items()}
        self.scale = {n: torch.where(spread > 0.0, spread, 1.0) for n, spread in spreads.items()}

    def pairs(self, tensors: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Tell prototypes and coefficients of the SVMs that move."""
        return dict(zip(self.names, zip(tensors[::2], tensors[1::2], strict=True), strict=True))

    def loss(self, tensors: Sequence[Tensor]) -> Tensor:
        """Evaluate the objective, and add its gradient to ``.grad`` of the tensors."""
        moved, total = self.pairs(tensors), torch.zeros_like(self.scale[self.final])
        for name, pair in moved.items():
            part = 2 * self.smoothness * self.targets[name].distance(*pair) / self.scale[name]
            (ANCHOR * part).backward()
            total = total + ANCHOR * part.detach()
        scorers = {
            name: partial(self._score, name, moved.get(name, (own.vectors, own.coefficients)))
            for name, own in self.start.items()
        }
        count = len(self.wanted[self.final])
        rows = min(target.block_rows for target in self.targets.values())
        for top in range(0, count, rows):
            block = slice(top, top + rows)
            inputs = {name: z[block].double() for name, z in self.features.items()}
            part = torch.zeros_like(total)
            for name, found in stack_scores(scorers, inputs).items():
                error = (found - self.wanted[name][block]).square().sum() / self.scale[name]
                part = part + (1.0 if name == self.final else ANCHOR) * error / count
            part.backward()
            total = total + part.detach()
        return total

    def _score(self, name: str, pair: tuple[Tensor, Tensor], inputs: Tensor) -> Tensor:
        return self.targets[name].scores(inputs, *pair) + self.intercepts[name]


def tune_together(
    svms: Mapping[str, RBFSVM],
    compressed: Mapping[str, RBFSVM],
    features: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    names: Sequence[str],
    *,
    steps: int,
    smoothness: float,
) -> dict[str, RBFSVM]:
    """Descend on the difference of the final scores by all prototypes and coefficients at once.

    Args:
        svms: The original SVMs: by layer, then the combiner.
        compressed: Those in their place, left as they are.
        features: By layer, ``(n, d)``.
        wanted: Scores of the original SVMs, by name.
        names: The SVMs whose prototypes move.
        steps: Iterations of L-BFGS; the best point is kept.
        smoothness: Weight of the difference in the space of the kernel.

    Returns:
        SVMs by name, the ones that do not move as they were.
    """
    problem = JointProblem(svms, compressed, features, wanted, names, smoothness)
    start = [
        t for n in problem.names for t in (problem.start[n].vectors, problem.start[n].coefficients)
    ]
    found = problem.pairs(minimise(start, problem.loss, steps))
    return {
        name: with_prototypes(svm, *found[name]) if name in found else svm
        for name, svm in compressed.items()
    }
