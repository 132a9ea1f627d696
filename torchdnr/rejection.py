"""The rejection rule, its threshold, and the classifier that carries both."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchdnr.costs import stage
from torchdnr.distributed.processes import Processes, default_processes
from torchdnr.inputs import check_images
from torchdnr.shared_data import check_same
from torchdnr.svm.state import NotFittedError

REJECT = -1
"""Label of a rejected input."""


def predict_with_rejection(scores: Tensor, threshold: Tensor | float) -> Tensor:
    """Predict labels, rejecting every input whose best score is not above the threshold.

    Args:
        scores: Class scores, ``(n, c)``.
        threshold: Rejection threshold theta, a scalar.

    Returns:
        Labels 0..c-1, or ``REJECT``, int64 ``(n,)``. A tie with the threshold rejects.

    Source: Sotgiu et al., Sec. II: rejected if the maximum score "is not higher than" theta.
    """
    best, labels = scores.max(dim=1)
    return torch.where(best > threshold, labels, REJECT)


def rejection_threshold(scores: Tensor, rejection_rate: float) -> Tensor:
    """Find the threshold that rejects a given share of the scored inputs.

    With distinct best scores exactly ``floor(rejection_rate * n)`` inputs are rejected. The
    threshold lies halfway between the last rejected and the first accepted best score, so that
    rounding in another batch size does not change the decision about either of them.

    Args:
        scores: Class scores of calibration inputs that nothing was fitted on, ``(n, c)``.
        rejection_rate: Share to reject, in [0, 1).

    Returns:
        Threshold, a scalar tensor like ``scores``.

    Raises:
        ValueError: If there are no scores, a score is not finite, or the rate is outside [0, 1).
    """
    if scores.ndim != 2 or scores.shape[0] == 0:
        raise ValueError(f"scores must be (n, c) with n >= 1, got {tuple(scores.shape)}")
    if not 0.0 <= rejection_rate < 1.0:
        raise ValueError(f"rejection_rate must be in [0, 1), got {rejection_rate}")
    best = scores.max(dim=1).values.sort().values
    if not torch.isfinite(best).all():
        raise ValueError("scores must be finite to set a threshold, got NaN or infinity")
    rejected = math.floor(rejection_rate * len(best) + 1e-9)  # 0.29 * 100 is 28.999...
    if rejected == 0:
        return torch.nextafter(best[0], torch.full_like(best[0], -math.inf))
    last_rejected, first_accepted = best[rejected - 1], best[rejected]
    middle = last_rejected + (first_accepted - last_rejected) / 2
    return torch.where(middle < first_accepted, middle, last_rejected)


class RejectingClassifier(nn.Module, ABC):
    """A classifier whose forward pass puts the rejection threshold beside its class scores.

    Subclasses define ``scores``. The output has c + 1 columns with the threshold last; an input is
    accepted if and only if its best class score is greater than the threshold.

    Args:
        batch_size: Images per forward pass in ``predict``, ``calibrate`` and ``fit``.

    Attributes:
        threshold: theta, a scalar buffer; NaN until it is set.
    """

    def __init__(self, batch_size: int = 256) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self.batch_size = batch_size
        self.register_buffer("threshold", torch.tensor(math.nan))
        self._threshold_seen = False

    @abstractmethod
    def scores(self, inputs: Tensor) -> Tensor:
        """Compute class scores, ``(n, c)``, of images ``(n, ...)`` in [0, 1]."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes c."""

    @property
    def device(self) -> torch.device:
        """Where the scores are computed: the device of the network."""
        return next((p.device for p in self.parameters()), self.threshold.device)

    @property
    def reject_index(self) -> int:
        """Column of the threshold in the output; it tells attacks that there is one."""
        return self.num_classes

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute class scores and threshold.

        Values of the inputs are not checked here, since that would stall a GPU in every step of
        an attack; ``predict``, ``fit`` and ``calibrate`` check them.

        Args:
            inputs: Images in [0, 1], ``(n, ...)``.

        Returns:
            ``(n, c + 1)``: scores s_1..s_c, then theta. A fresh tensor.

        Raises:
            NotFittedError: If the classifier is not fitted or its threshold is not set.
        """
        scores = self.scores(inputs)
        self._require_threshold()
        return torch.cat([scores, self.threshold.to(scores).expand(scores.shape[0], 1)], dim=1)

    @torch.no_grad()
    def predict(self, inputs: Tensor) -> Tensor:
        """Predict labels or reject, batch by batch.

        Args:
            inputs: Images in [0, 1], ``(n, ...)``.

        Returns:
            0..c-1, or ``REJECT`` = -1, int64 ``(n,)``.

        Raises:
            ValueError: If the images are empty, not floating point, outside [0, 1] or NaN.
            NotFittedError: If the classifier is not fitted or its threshold is not set.
        """
        check_images("inputs", inputs)
        self._require_threshold()
        batches = inputs.split(self.batch_size)
        # Called as a user calls it: after compile() it runs the compiled program.
        output = torch.cat([self(batch.to(self.device)) for batch in batches])
        return predict_with_rejection(output[:, :-1], output[:, -1])

    @torch.no_grad()
    def calibrate(
        self,
        inputs: Tensor | Iterable[Any],
        rejection_rate: float = 0.10,
        *,
        processes: Processes | None = None,
    ) -> "RejectingClassifier":
        """Set the threshold so that a given share of clean images is rejected.

        Several processes share the work where ``torch.distributed`` is set up: all call this with
        the same images, each scores some batches, and all get the same threshold.

        Args:
            inputs: Images ``(n, ...)`` in [0, 1], or a loader of batches (labels are ignored),
                used for nothing else: neither fitted on nor tested on.
            rejection_rate: Share to reject, in [0, 1).
            processes: Those that share the work; default: torch.distributed's default group, if
                there is one. ``processes.ALONE``: this one calibrates by itself.

        Returns:
            The classifier itself.

        Raises:
            ValueError: If the images or the rate are not as said above.
            NotFittedError: If the classifier is not fitted.
            PeerError: If another of the processes has ended.
        """
        processes = default_processes() if processes is None else processes
        batch_size = self.batch_size
        if isinstance(inputs, Tensor):  # a batch for each process at least
            batch_size = max(1, min(batch_size, math.ceil(len(inputs) / processes.count)))
        with stage("threshold"):
            scores = self._shared_scores(checked_batches(inputs, batch_size), processes)
            self.set_threshold(rejection_threshold(scores, rejection_rate))
        return self

    def _shared_scores(
        self, batches: Iterator[tuple[Tensor, Tensor | None]], processes: Processes
    ) -> Tensor:
        """Score all batches, which are dealt to the processes; in any order, ``(n, c)``."""
        labels: list[Tensor | None] = []
        own: list[Tensor] = []
        first = torch.empty(0)  # there is a batch at least
        for number, (images, given) in enumerate(batches):
            first = images if number == 0 else first
            labels.append(given)
            if processes.mine(number):
                own.append(self.scores(images.to(self.device)))
        check_same(processes, self, labels, first)
        # One that got no batch still has to know what scores are like.
        scores = torch.cat(own) if own else self.scores(first[:1].to(self.device))[:0]
        return processes.gather(scores, processes.numbers(len(scores)))

    def set_threshold(self, threshold: float | Tensor) -> None:
        """Set theta by hand.

        Args:
            threshold: A finite number.

        Raises:
            ValueError: If it is not finite.
        """
        value = torch.as_tensor(threshold, device=self.device).reshape(())
        if not torch.isfinite(value):
            raise ValueError(f"threshold must be finite, got {value.item()}")
        self.threshold = value if value.is_floating_point() else value.float()
        self._threshold_seen = True

    def reset_threshold(self) -> None:
        """Forget theta, as after a new fit."""
        self.threshold = torch.full_like(self.threshold, math.nan)
        self._threshold_seen = False

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: object, **kwargs: object
    ) -> None:
        """Look at the threshold again; where none was set, take the stored dtype."""
        stored = state_dict.get(prefix + "threshold")
        if stored is not None and torch.isnan(self.threshold):
            self.threshold = self.threshold.to(stored.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._threshold_seen = not torch.isnan(self.threshold).item()

    def _require_threshold(self) -> None:
        # Looked at once: reading it stalls a GPU, and breaks the graph of torch.compile.
        if not self._threshold_seen:
            if torch.isnan(self.threshold):
                raise NotFittedError(
                    "the rejection threshold is not set: call calibrate(images) with images that "
                    "were not used in fit, or set_threshold(value); scores(x) works without it"
                )
            self._threshold_seen = True


def checked_batches(
    data: Tensor | Iterable[Any], batch_size: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield checked batches of images, with their labels where there are any.

    Args:
        data: Images ``(n, ...)``, or an iterable such as a ``DataLoader`` that yields images or
            ``(images, labels)``.
        batch_size: Images per batch where ``data`` is a tensor.

    Yields:
        Images in [0, 1], and labels or None.

    Raises:
        ValueError: If a batch is not as said above, or there is none.
    """
    if isinstance(data, Tensor):
        check_images("inputs", data)
        yield from ((batch, None) for batch in data.split(batch_size))
        return
    count = 0
    for batch in data:
        images, *rest = batch if isinstance(batch, Sequence) and batch else (batch,)
        if not isinstance(images, Tensor):
            raise ValueError(
                "each batch of the loader must be images, or (images, labels), as tensors; got "
                f"{type(images).__name__}"
            )
        check_images("inputs", images)
        count += 1
        yield images, torch.as_tensor(rest[0]) if rest else None
    if count == 0:
        raise ValueError("the loader yielded no batch: expected at least one image")
