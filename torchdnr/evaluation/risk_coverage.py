"""The error among the accepted inputs, over the share that is accepted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchdnr.evaluation.detection import rejection_scores
from torchdnr.evaluation.judging import check_labels, decide
from torchdnr.evaluation.metrics import Estimate, Plain, share


@dataclass(frozen=True, eq=False)
class RiskCoverage(Plain):
    """Error among the accepted inputs at every threshold.

    Attributes:
        coverage: Share of the inputs accepted, rising to 1, float64 ``(t,)``; inputs with equal
            scores are accepted together.
        risk: Share of these that is wrong, float64 ``(t,)``.
        aurc: Area under the curve: the mean, over the inputs, of the risk where each is accepted
            last. 0 if nothing is wrong; the lower, the better the scores tell right from wrong.
        accepted: Share accepted at the classifier's theta; None if it has none.
        error: Share of these that is wrong; None if it has no theta.
        n: Number of inputs.
    """

    coverage: Tensor
    risk: Tensor
    aurc: float
    accepted: Estimate | None
    error: Estimate | None
    n: int

    def at(self, coverage: float, *, confidence: float = 0.95) -> Estimate:
        """Measure the risk where at least a share of the inputs, in (0, 1], is accepted."""
        if not 0 < coverage <= 1:
            raise ValueError(f"coverage must be in (0, 1], got {coverage}")
        index = int((self.coverage < coverage - 1e-9).sum())
        k = round(self.coverage[index].item() * self.n)
        errors = round(self.risk[index].item() * k)
        return share(torch.arange(k) < errors, confidence=confidence)


def risk_coverage(output: Tensor, labels: Tensor, reject: bool) -> RiskCoverage:
    """Compute the risk-coverage curve of a classifier on clean inputs, and its area AURC.

    Args:
        output: Scores ``(n, c)``, or with ``reject`` ``(n, c + 1)`` with theta last.
        labels: True labels, ``(n,)``.
        reject: Whether the last column is theta. Inputs are accepted in the order of ``max_k s_k -
            theta``, without theta in that of ``max_k s_k``.

    Returns:
        ``RiskCoverage``.

    Raises:
        ValueError: If an argument is not as described.

    Source: El-Yaniv and Wiener, "On the foundations of noise-free selective classification", JMLR
    11 (2010); Geifman et al., "Bias-reduced uncertainty estimation", ICLR 2019, for AURC.
    """
    check_labels(labels, output)
    output, labels = output.cpu(), labels.cpu()  # some devices have no float64
    decisions, n = decide(output, reject), len(labels)
    wrong = decisions.classes != labels
    scores, order = (-rejection_scores(output.double(), reject)).sort(descending=True)
    is_last = torch.ones_like(wrong)  # of those with equal scores
    is_last[:-1] = scores[:-1] > scores[1:]
    k = is_last.nonzero()[:, 0].double() + 1
    risk = wrong[order].double().cumsum(0)[is_last] / k
    sizes = torch.diff(k, prepend=k.new_zeros(1))
    return RiskCoverage(
        coverage=k / n,
        risk=risk,
        aurc=((risk * sizes).sum() / n).item(),
        accepted=share(decisions.accepted) if reject else None,
        error=share(wrong, decisions.accepted) if reject else None,
        n=n,
    )
