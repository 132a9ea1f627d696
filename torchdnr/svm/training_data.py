"""What an `RBFSVM` is fitted on: the samples that count, their kernel and its width."""

from dataclasses import dataclass, replace

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from torchdnr.distributed.sharing import SharedFeatures
from torchdnr.kernels.any_kernel import kernel_matrix, rbf_gamma, scale_gamma
from torchdnr.svm.checks import check_gram, check_sample_weight
from torchdnr.svm.dual import DualSolution
from torchdnr.svm.gram import KernelRows, distance_rows, rbf_rows
from torchdnr.svm.memory_plan import plan_features, plan_memory


@dataclass(frozen=True)
class TrainingData:
    """Samples of weight > 0, and where they stood among all n.

    Attributes:
        features: ``(k, d)``, perhaps shared by several processes; with a precomputed kernel its
            matrix between the k samples.
        labels: ``(k,)``.
        weight: Their weights, float64 ``(k,)``; None if all are 1.
        kept: Their indices among the n samples, int64 ``(k,)``.
        count: n.
        center: Mean of the features, ``(d,)``; zeros ``(n,)`` with a precomputed kernel.
        distances: Squared distances between the features, ``(k, k)``, if they are at hand; only
            those to this process's samples where several share the features.
        is_precomputed: Whether the features are kernel values.
    """

    features: SharedFeatures
    labels: Tensor
    weight: Tensor | None
    kept: Tensor
    count: int
    center: Tensor
    distances: Tensor | None
    is_precomputed: bool

    def gamma(self, given: float | str) -> float:
        """Compute the kernel width.

        Args:
            given: As ``checked_gamma`` returns it.

        Returns:
            Gamma.

        Raises:
            ValueError: If the variance of the features is not finite.
        """
        if given == "auto":
            return 1.0 / self.features.shape[1]
        if given != "scale":
            return float(given)
        gamma = scale_gamma(self.features)
        if not 0.0 < gamma < float("inf"):
            raise ValueError(
                f'gamma="scale" is {gamma} here, for the variance of the features overflows or '
                "vanishes: scale the features"
            )
        return gamma

    @torch.no_grad()
    def gram(
        self, kernel: Kernel | None, problems: int, memory_limit: int | None
    ) -> Tensor | KernelRows:
        """Prepare the Gram matrix with the very kernel that will score.

        Args:
            kernel: The kernel; None for a precomputed one.
            problems: Problems that will be solved on it at once.
            memory_limit: Bytes that the fit may take; None for the default.

        Returns:
            Kernel values, ``(k, k)``: whole if they are at hand, otherwise evaluated on demand.

        Raises:
            ValueError: If the memory limit is too small, or squared distances overflow.
        """
        features, center, n = self.features, self.center, len(self.features)
        own, shares = features.own, features.shares
        if self.is_precomputed:
            return own
        itemsize, gamma, width = own.element_size(), rbf_gamma(kernel), shares.largest
        if gamma is None:
            # gpytorch takes the features whole, centred on both sides.
            copies = 2 * itemsize * width * own.shape[1]
            return KernelRows(
                lambda index: kernel_matrix(kernel, features.take(index), own, center),
                n,
                own,
                plan_memory(n, problems, itemsize, memory_limit, copies, width),
                shares=shares,
            )
        if self.distances is not None:
            plan = plan_memory(n, problems, itemsize, memory_limit, width=width)
            return distance_rows(self.distances, gamma.item(), plan, shares)
        blocks = plan_features(features, problems, memory_limit)
        plan = plan_memory(n, problems, itemsize, memory_limit, blocks.taken, width)
        return rbf_rows(features, gamma.item(), center, plan, blocks)

    def support_vectors(self, chosen: Tensor) -> Tensor:
        """Copy the rows of support vectors.

        Args:
            chosen: Which samples are, bool ``(k,)``.

        Returns:
            Features, ``(m, d)``; ``(m, 0)`` with a precomputed kernel.
        """
        if self.is_precomputed:
            return self.features.own[chosen, :0]
        return self.features.take(chosen.nonzero().squeeze(1))

    def of_all_samples(self, solution: DualSolution) -> DualSolution:
        """Give the samples of weight 0 their place, with b = 0 and no score.

        Args:
            solution: Of the k samples.

        Returns:
            The same with ``dual_coef`` and ``scores`` ``(n, P)``; scores left out are NaN.
        """
        if len(self.kept) == self.count:
            return solution
        spread = {}
        for name in ("dual_coef", "scores"):
            values = getattr(solution, name)
            missing = 0.0 if name == "dual_coef" else torch.nan
            whole = values.new_full((self.count, values.shape[1]), missing)
            spread[name] = whole.index_copy(0, self.kept, values)
        return replace(solution, **spread)


def select_training_data(
    features: Tensor | SharedFeatures,
    labels: Tensor,
    num_classes: int,
    sample_weight: Tensor | None,
    distances: Tensor | None,
    is_precomputed: bool,
) -> TrainingData:
    """Check kernel values and weights, and leave out the samples of weight 0.

    Args:
        features: ``(n, d)``, perhaps shared by several processes, or a precomputed kernel,
            ``(n, n)``.
        labels: ``(n,)`` in 0..c-1.
        num_classes: c.
        sample_weight: ``(n,)``, or None for 1 each.
        distances: Squared distances between the features, ``(n, n)``, if they are at hand; only
            those to this process's samples where several share the features.
        is_precomputed: Whether the features are kernel values.

    Returns:
        The samples that count.

    Raises:
        ValueError: If the kernel is not a Gram matrix, or weights do not fit.
    """
    features = SharedFeatures.of(features)
    n, weight, own = len(features), None, features.own
    if is_precomputed:
        if features.shares.processes.count > 1:
            raise ValueError("a precomputed kernel must be whole, got shared rows: pass a tensor")
        check_gram(own)
    kept = torch.arange(n, device=own.device)
    if sample_weight is not None:
        weight = torch.as_tensor(sample_weight, dtype=torch.float64, device=own.device)
        check_sample_weight(weight, labels, num_classes)
        kept = weight.nonzero().squeeze(1)
    if len(kept) < n:
        columns, here = features.shares.places(kept)
        columns = columns[here]
        if is_precomputed:
            features = SharedFeatures.of(own[kept][:, kept])
        else:
            features = features.select(kept)
        distances = None if distances is None else distances[kept][:, columns]
        labels, weight = labels[kept], weight[kept]
    center = own.new_zeros(n) if is_precomputed else features.means()
    return TrainingData(features, labels, weight, kept, n, center, distances, is_precomputed)


def checked_gamma(gamma: float | str) -> float | str:
    """Check a kernel width.

    Args:
        gamma: A number > 0, ``"scale"`` or ``"auto"``.

    Returns:
        The same, a number as float.

    Raises:
        ValueError: If it is anything else.
    """
    named = isinstance(gamma, str)
    if gamma not in ("scale", "auto") if named else not 0.0 < gamma < float("inf"):
        raise ValueError(f'gamma must be a number > 0, "scale" or "auto", got {gamma!r}')
    return gamma if named else float(gamma)
