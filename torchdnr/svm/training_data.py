"""What an `RBFSVM` is fitted on: the samples of weight > 0, their kernel and its width."""

from dataclasses import dataclass

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from torchdnr.arrays import ArrayLike
from torchdnr.distributed.sharing import ShardedFeatures
from torchdnr.kernels.any_kernel import gamma_for_variance, kernel_matrix, rbf_gamma
from torchdnr.svm.checks import check_gram, checked_sample_weight
from torchdnr.svm.gram import planned_rows, rows_on_demand
from torchdnr.svm.kernel_rows import KernelRows
from torchdnr.svm.memory_plan import plan_memory


@dataclass(frozen=True)
class TrainingData:
    """Samples of weight > 0, k of n."""

    features: ShardedFeatures  # (k, d); with a precomputed kernel its matrix between the k samples
    labels: Tensor  # (k,)
    weight: Tensor | None  # float64 (k,); None if all are 1
    kept: Tensor  # indices among the n samples, int64 (k,)
    center: Tensor  # mean of the features, (d,); zeros (n,) with a precomputed kernel
    distances: Tensor | None  # squared ones to this process's features, if they are at hand
    is_precomputed: bool  # whether the features are kernel values

    def gamma(self, given: float | str) -> float:
        """Compute the kernel width from what ``checked_gamma`` returned."""
        if given == "auto":
            return 1.0 / self.features.shape[1]
        if given != "scale":
            return float(given)
        gamma = gamma_for_variance(self.features.variance(), self.features.shape[1])
        if not 0.0 < gamma < float("inf"):
            raise ValueError(
                f'gamma="scale" is {gamma} here, for the variance of the features overflows or '
                "vanishes: scale the features"
            )
        return gamma

    def differentiable_gamma(self, given: float | str) -> Tensor:
        """Compute the kernel width as a float64 scalar, a function of the features if "scale"."""
        local = self.features.local.double()
        if given == "scale" and self.gamma(given):
            return 1.0 / (local.shape[1] * local.var(correction=0))
        return torch.tensor(self.gamma(given), dtype=local.dtype, device=local.device)

    @torch.no_grad()
    def gram(
        self, kernel: Kernel | None, problems: int, memory_limit: int | None
    ) -> Tensor | KernelRows:
        """Make the Gram matrix with the very kernel that will score; None if precomputed.

        It is whole if it is at hand, otherwise its rows are evaluated on demand.
        """
        features, center, local = self.features, self.center, self.features.local
        if kernel is None:
            return local
        gamma = rbf_gamma(kernel)
        if gamma is not None:
            return planned_rows(
                features, gamma.item(), center, problems, memory_limit, self.distances
            )
        width, itemsize = features.partition.largest, local.element_size()
        # gpytorch takes the features whole, centred on both sides.
        copies = 2 * itemsize * width * local.shape[1]
        plan = plan_memory(len(features), problems, itemsize, memory_limit, copies, width)

        def evaluate(index: Tensor) -> Tensor:
            return kernel_matrix(kernel, features.rows(index), local, center)

        return rows_on_demand(evaluate, features.partition, local, plan)

    def support_vectors(self, chosen: Tensor) -> Tensor:
        """Copy the chosen rows, bool ``(k,)``: ``(m, d)``; ``(m, 0)`` with a precomputed kernel."""
        if self.is_precomputed:
            return self.features.local[chosen, :0]
        return self.features.rows(chosen.nonzero().squeeze(1))


def select_training_data(
    features: Tensor | ShardedFeatures,
    labels: Tensor,
    num_classes: int,
    sample_weight: ArrayLike | None,
    distances: Tensor | None,
    is_precomputed: bool,
) -> TrainingData:
    """Check kernel values and weights, and leave out samples of weight 0; see ``RBFSVM.fit``."""
    features = ShardedFeatures.of(features)
    n, local = len(features), features.local
    if is_precomputed:
        if features.partition.processes.count > 1:
            raise ValueError("a precomputed kernel must be whole, got sharded rows: pass a tensor")
        check_gram(local)
    kept = torch.arange(n, device=local.device)
    weight = checked_sample_weight(sample_weight, labels, num_classes)
    if weight is not None:
        kept = weight.nonzero().squeeze(1)
        labels, weight = labels[kept], weight[kept]
    if len(kept) < n:
        columns, is_local = features.partition.locate(kept)
        distances = None if distances is None else distances[kept][:, columns[is_local]]
        if is_precomputed:
            features = ShardedFeatures.of(local[kept][:, kept])
        else:
            features = features.select(kept)
    center = local.new_zeros(n) if is_precomputed else features.means()
    return TrainingData(features, labels, weight, kept, center, distances, is_precomputed)


def checked_gamma(gamma: float | str) -> float | str:
    """Return a kernel width: a number > 0 as float, ``"scale"`` or ``"auto"``."""
    if isinstance(gamma, str):
        if gamma in ("scale", "auto"):
            return gamma
    elif 0.0 < gamma < float("inf"):
        return float(gamma)
    raise ValueError(f'gamma must be a number > 0, "scale" or "auto", got {gamma!r}')
