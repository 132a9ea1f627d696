"""Do the inputs, the labels and the curve belong together?"""

from torch import Tensor

from torchdnr.attacks.checks import check_inputs, check_like
from torchdnr.evaluation.curve import SecurityCurve
from torchdnr.inputs import check_images


def check_evaluation(
    inputs: Tensor,
    labels: Tensor,
    curve: SecurityCurve,
    norm: float,
    bounds: tuple[float, float],
    init_inputs: Tensor | None,
) -> None:
    """Refuse inputs that no attack can work with, or a curve of other inputs.

    Raises:
        ValueError: If they are.
    """
    check_inputs(inputs, labels, norm, bounds)
    if init_inputs is not None:
        check_images("init_inputs", init_inputs, bounds)
        check_like("init_inputs", init_inputs, inputs)
    if norm != curve.norm:
        raise ValueError(f"norm must be that of the curve, {curve.norm:g}, got {norm:g}")
    if curve.labels.shape != labels.shape or (curve.labels != labels.cpu()).any():
        raise ValueError(
            f"labels must be those of the curve, of {len(curve.labels)} samples in that order, "
            f"got {len(labels)} of others: pass the inputs and labels that were evaluated"
        )
    if curve.adversarial is not None and curve.adversarial.shape[1:] != inputs.shape:
        raise ValueError(
            f"inputs must be like the points of the curve, {tuple(curve.adversarial.shape[1:])}, "
            f"got {tuple(inputs.shape)}"
        )
