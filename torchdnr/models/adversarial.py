"""Training against attacks: an adversary, the attack it makes on each batch, and four losses."""

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from torchdnr.attacks.boundary_walk import boundary_walk
from torchdnr.attacks.directions import cosine, steepest
from torchdnr.attacks.objectives import ObjectiveFunction
from torchdnr.attacks.projections import UNBOUNDED, Region, per_row, project, random_points
from torchdnr.attacks.starts import lengths
from torchdnr.attacks.target import Target, evaluate, keep_lower, slope_at
from torchdnr.decisions import (
    check_images,
    class_scores,
    evaluation_mode,
    split_scores,
    succeeds,
    true_and_best_other,
)

BOUNDS = 0.0, 1.0
HELD_OUT = 32  # images that training measures its attack on
# That the boundary walk evades with more of them, and how many times as many, before it is said:
# seven usual steps of PGD find 1 where it finds 10, these here 2 to 6 where it finds 7 to 14.
FAR_WEAKER = 8, 3
_POOL = 300  # images that the walk starts from
_RAMP_FROM = 0.2  # eps at the beginning, relative to that at the end
_CONFIDENCE_POWER = 10  # rho of Stutz et al.


class WeakAttackWarning(UserWarning):
    """The attack of a training misses much of what a stronger one finds: its loss flatters."""


@dataclass(frozen=True)
class Adversary:
    """What to train against: attacks of a size on every batch, and the loss on what they find.

    The attack takes ``steps`` of steepest descent among the coordinates that the box lets move,
    shorter and shorter along a cosine, and keeps the best point. Most runs start at an image of
    another class, moved into the ball: from the image alone, or from random points, seven steps
    find a tenth of the evasions that there are, and training against them looks splendid while
    robustness falls. Training on 320 images or more measures it: one to four times the attack and a
    boundary walk are run on 32 that are held out, and a ``WeakAttackWarning`` says if the walk
    evades with eight more of them at least, and three times as many.

    Attributes:
        eps: Largest perturbation, > 0, of images in [0, 1].
        norm: Its norm: 1, 2 or infinity.
        loss: "reject": an attacked image may be rejected, rejection is one more logit fixed at 0;
            "plain": it has to be right (Madry et al.); "class": it may be rejected, which is a
            class that the network has an output for, the last one; "confidence": the prediction
            has to be the less sure the larger the perturbation, whose largest size is then drawn
            for each image, uniformly up to eps (after CCAT).
        steps: Steps of the attack, >= 1.
        far_starts: Share of the attacks, in [0, 1], that start at one of the ``neighbours`` nearest
            images of other classes in the batch; the others start at random points of the ball.
        neighbours: See ``far_starts``; >= 1.
        step_sizes: First and last step, relative to eps.
        ramp: Share of the training, in [0, 1), over which eps rises from a fifth of its value.
        masked: Whether coordinates that the box blocks are taken out before a step is scaled to its
            length. Without, steps of the l2 norm are mostly lost in the projection on images with
            many black or white pixels.

    Source: "plain": Madry et al., "Towards deep learning models resistant to adversarial attacks",
    ICLR 2018. "class": a baseline of Chen et al., "Stratified adversarial robustness with
    rejection", ICML 2023. "confidence": Stutz et al., "Confidence-calibrated adversarial training",
    ICML 2020, whose attack starts at the image instead. "reject": the loss of "class", with a logit
    that is not learned.
    """

    eps: float
    norm: float = 2
    loss: str = "reject"
    steps: int = 7
    far_starts: float = 0.7
    neighbours: int = 5
    step_sizes: tuple[float, float] = (1.5, 0.07)
    ramp: float = 0.24
    masked: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        ranges = {
            "eps > 0": 0 < self.eps < math.inf,
            "norm 1, 2 or infinity": self.norm in (1, 2, math.inf),
            f"loss in {tuple(LOSSES)}": self.loss in LOSSES,
            "steps >= 1": self.steps >= 1,
            "0 <= far_starts <= 1": 0 <= self.far_starts <= 1,
            "neighbours >= 1": self.neighbours >= 1,
            "two step_sizes > 0": len(self.step_sizes) == 2 and min(self.step_sizes) > 0,
            "0 <= ramp < 1": 0 <= self.ramp < 1,
        }
        for rule, holds in ranges.items():
            if not holds:
                raise ValueError(f"expected {rule}, got {self}; change that option")

    def eps_at(self, share: float) -> float:
        """Return eps when a share of the training is done."""
        rise = min(1.0, share / self.ramp) if self.ramp else 1.0
        return self.eps * (_RAMP_FROM + (1 - _RAMP_FROM) * rise)


def attack_batch(
    target: Target, inputs: Tensor, labels: Tensor, adversary: Adversary, eps: float | Tensor
) -> Tensor:
    """Attack a batch ``(n, ...)`` within ``eps``, with no wait for a GPU; return the best points.

    ``eps`` is a number or ``(n,)``. Random numbers are those of the device's global generator.
    """
    radius = torch.as_tensor(eps, dtype=inputs.dtype, device=inputs.device).expand(len(inputs))
    region = Region(inputs, radius, adversary.norm, BOUNDS)
    points = _starts(region, labels, adversary)
    bounds = BOUNDS if adversary.masked else UNBOUNDED
    best = None
    for step in range(adversary.steps):
        slope = slope_at(target, points, labels, bounds)
        best = slope.points if best is None else keep_lower(best, slope.points)
        sizes = per_row(radius * cosine(step, adversary.steps, *adversary.step_sizes), points)
        direction = steepest(slope.direction, points, region.norm, bounds)
        points = project(torch.addcmul(points, sizes, direction), *region)
    last = evaluate(target, points, labels)
    return (last if best is None else keep_lower(best, last)).inputs


def _starts(region: Region, labels: Tensor, adversary: Adversary) -> Tensor:
    """Choose where each attack starts: at an image of another class, or at a random point."""
    inputs, n = region.center, len(labels)
    flat = inputs.flatten(1)
    distances = torch.cdist(flat, flat).masked_fill(labels[:, None] == labels, torch.inf)
    nearest = distances.topk(min(adversary.neighbours, n), largest=False)
    column = torch.randint(0, nearest.indices.shape[1], (n, 1), device=inputs.device)
    far = nearest.values.gather(1, column)[:, 0].isfinite()
    far = far & (torch.rand(n, device=inputs.device) < adversary.far_starts)
    others = project(inputs[nearest.indices.gather(1, column)[:, 0]], *region)
    return torch.where(per_row(far, inputs), others, random_points(region, None))


class LossFunction(Protocol):
    """The loss on attacked images."""

    def __call__(self, output: Tensor, labels: Tensor, size: Tensor) -> Tensor:
        """Compute the mean loss of outputs ``(n, c)`` or ``(n, c + 1)``.

        ``size`` ``(n,)`` is that of the perturbations relative to eps, at most 1.
        """


class _Loss(NamedTuple):
    """How to train: what an attack minimises, what is descended, and what the network returns."""

    objective: ObjectiveFunction
    attacked: LossFunction
    clean: bool  # whether the cross-entropy on the images themselves is part of the loss
    reject: bool  # whether outputs have a last column that rejects
    learned: bool = False  # whether that column is an output of the network, not 0
    any_size: bool = False  # whether each attack has an eps of its own, up to that of the adversary


def _stay(scores: Tensor, threshold: Tensor | None, labels: Tensor) -> Tensor:
    """Compute the log-sum-exp of what the attacker does not want: the true class, or to reject."""
    true = scores.gather(1, labels[:, None])[:, 0]
    return true if threshold is None else torch.logaddexp(true, threshold)


def soft_decision_objective(
    scores: Tensor, threshold: Tensor | None, classes: Tensor, targeted: bool = False
) -> Tensor:
    """Compute the "decision" objective with log-sum-exps in the place of maxima, temperature 1."""
    others = scores.scatter(1, classes[:, None], -torch.inf).logsumexp(dim=1)
    return _stay(scores, threshold, classes) - others


def wrong_confidence_objective(
    scores: Tensor, threshold: Tensor | None, classes: Tensor, targeted: bool = False
) -> Tensor:
    """Compute minus the largest log-probability of a wrong class."""
    return -true_and_best_other(scores.log_softmax(dim=1), classes)[1]


def loss_unless_rejected(output: Tensor, labels: Tensor, size: Tensor) -> Tensor:
    """Compute minus the log-probability of being right or rejected, by the last column."""
    return (output.logsumexp(dim=1) - _stay(*split_scores(output, True), labels)).mean()


def loss_if_wrong(output: Tensor, labels: Tensor, size: Tensor) -> Tensor:
    """Compute the cross-entropy."""
    return nn.functional.cross_entropy(output, labels)


def loss_if_sure(output: Tensor, labels: Tensor, size: Tensor) -> Tensor:
    """Compute the cross-entropy to the label, mixed with the uniform distribution by size."""
    share = (1 - size).clamp(0, 1)[:, None] ** _CONFIDENCE_POWER
    one_hot = nn.functional.one_hot(labels, output.shape[1]).to(output)
    wanted = share * one_hot + (1 - share) / output.shape[1]
    return nn.functional.cross_entropy(output, wanted)


LOSSES = {
    "reject": _Loss(soft_decision_objective, loss_unless_rejected, clean=True, reject=True),
    "plain": _Loss(soft_decision_objective, loss_if_wrong, clean=False, reject=False),
    "class": _Loss(
        soft_decision_objective, loss_unless_rejected, clean=True, reject=True, learned=True
    ),
    "confidence": _Loss(
        wrong_confidence_objective, loss_if_sure, clean=True, reject=False, any_size=True
    ),
}
"""Losses by name, see ``Adversary``."""


class AdversarialLoss:
    """The loss of a network against an adversary, who attacks every batch anew.

    Args:
        net: From images to logits, ``(n, c)`` or, for the loss "class", ``(n, c + 1)``.
        adversary: Who attacks.
        images: All images ``(n, ...)`` in [0, 1]; 32 of 320 or more, evenly spread, are held out.
        labels: Their classes, ``(n,)``.

    Attributes:
        rows: Indices of those to train on.
    """

    def __init__(
        self, net: nn.Module, adversary: Adversary, images: Tensor, labels: Tensor
    ) -> None:
        self.net, self.adversary, self.share = net, adversary, 0.0
        self.loss = LOSSES[adversary.loss]
        check_images("images", images)
        self.images, self.labels = images, labels
        held_out = HELD_OUT if len(images) >= 10 * HELD_OUT else 0  # fewer could not tell
        self.held_out = _spread(torch.arange(len(images)), held_out)
        self.rows = torch.ones(len(images), dtype=torch.bool).index_fill(0, self.held_out, False)
        self.rows = self.rows.nonzero()[:, 0]
        self.target = Target(self.output, self.loss.objective, self.loss.reject, len(images))
        self._check_columns(int(labels.max()) + 1)

    def output(self, inputs: Tensor) -> Tensor:
        """Return logits ``(n, c)``, or ``(n, c + 1)`` with that of rejection last."""
        logits = class_scores(self.net(inputs))
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        zero = self.loss.reject and not self.loss.learned
        return nn.functional.pad(logits, (0, 1)) if zero else logits

    @torch.no_grad()
    def _check_columns(self, classes: int) -> None:
        device = next(self.net.parameters()).device
        with evaluation_mode(self.net):
            columns = self.output(self.images[:1].to(device)).shape[1] - self.loss.reject
        if columns < max(2, classes):
            raise ValueError(
                f'the loss "{self.adversary.loss}" needs a network of {max(2, classes)} classes'
                f"{' and a last output that rejects' if self.loss.learned else ''}, got outputs "
                f"for {columns}; build it with more"
            )

    def __call__(
        self, inputs: Tensor, labels: Tensor, share: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Attack a batch and compute its loss; see ``training.BatchLoss``."""
        self.share = share
        eps: float | Tensor = self.adversary.eps_at(share)
        if self.loss.any_size:
            eps = eps * torch.rand(len(inputs), dtype=inputs.dtype, device=inputs.device)
        with evaluation_mode(self.net):
            attacked = attack_batch(self.target, inputs, labels, self.adversary, eps)
        output = self.output(attacked)
        size = lengths(attacked, inputs, self.adversary.norm) / self.adversary.eps
        loss = robust = self.loss.attacked(output, labels, size)
        shown = {"robust_loss": robust.detach()}
        if self.loss.clean:
            clean = nn.functional.cross_entropy(self.output(inputs), labels)
            loss = clean + robust
            shown["clean_loss"] = clean.detach()
        evading = succeeds(output.detach(), labels, self.loss.reject)
        return loss, {**shown, "evading": evading.float().mean()}

    def measure(self) -> dict[str, float]:
        """Compare the attack with a boundary walk on the images held out: shares that evade.

        Warns:
            WeakAttackWarning: If the walk finds many more.
        """
        n = len(self.held_out)
        if n == 0:
            return {}
        device, eps = next(self.net.parameters()).device, self.adversary.eps_at(self.share)
        # Among as many others as there are in a batch: their images are what attacks start from.
        rows = torch.cat([self.held_out, _spread(self.rows, 3 * HELD_OUT)])
        inputs, labels = self._select(rows, device)
        pool, _ = self._select(_spread(self.rows, _POOL), device)
        norm, reject = self.adversary.norm, self.loss.reject
        with evaluation_mode(self.net), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "found no evading point")  # that is what is counted
            attacked = attack_batch(self.target, inputs, labels, self.adversary, eps)[:n]
            inputs, labels = inputs[:n], labels[:n]
            walked = boundary_walk(
                self.output, inputs, labels, pool, norm=norm, reject=reject, starts=8, neighbours=20
            )
            with torch.no_grad():
                by_attack = succeeds(self.output(attacked), labels, reject)
                by_walk = succeeds(self.output(walked), labels, reject)
        by_walk &= lengths(walked, inputs, norm) <= eps
        few, many = int(by_attack.sum()), int(by_walk.sum())
        if many - few >= FAR_WEAKER[0] and many >= FAR_WEAKER[1] * few:
            warnings.warn(
                f"at eps {eps:.3g} the attack of the training evades with {few} of {n} held-out "
                f"images, a boundary walk with {many}: training does not see most of what is "
                "wrong, and its loss flatters; take more steps, far_starts, or masked=True",
                WeakAttackWarning,
                stacklevel=4,
            )
        return {"held_out": few / n, "held_out_walk": many / n}

    def _select(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        images = self.images[rows.to(self.images.device)].to(device)
        return images, self.labels[rows.to(self.labels.device)].to(device)


def _spread(rows: Tensor, count: int) -> Tensor:
    """Choose so many rows, evenly, or all."""
    return rows[:: max(1, len(rows) // max(1, count))][:count]
