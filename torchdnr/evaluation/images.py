"""Adversarial images as files, one per sample and eps."""

from pathlib import Path

import torch
from PIL import Image

from torchdnr.decisions import REJECT, is_success
from torchdnr.evaluation.curve import SecurityCurve


def save_images(
    folder: str | Path, curve: SecurityCurve, *, bounds: tuple[float, float] = (0.0, 1.0)
) -> list[Path]:
    """Write the worst-case points of a curve as PNG files of 8 bits, which lose nothing more.

    The names tell classifier, eps, the number of the sample, and what becomes of the file's image:
    ``dnr-eps-1.5-sample-00003-evades.png``, or ``rejected``, or ``right``; with targets also
    ``wrong``, accepted as a class that was not wanted.

    Args:
        folder: Where to write; made if it is not there.
        curve: What ``security_evaluation`` returned, of images ``(n, 1 or 3, H, W)``.
        bounds: Values of black and white.

    Returns:
        The files, at each eps > 0 one per sample.

    Raises:
        ValueError: If the curve holds no points, or they are no images.
    """
    if curve.adversarial is None or curve.rounded is None:
        raise ValueError("curve holds no points, as after loading it; save those just measured")
    if curve.adversarial.ndim != 5 or curve.adversarial.shape[2] not in (1, 3):
        raise ValueError(
            "points must be grey or colour images (n, 1 or 3, H, W), "
            f"got {tuple(curve.adversarial.shape[1:])}"
        )
    folder, files = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    name = (curve.name or "classifier").lower()
    levels = (curve.adversarial - bounds[0]) / (bounds[1] - bounds[0]) * 255
    pixels = levels.round().to(torch.uint8).movedim(2, -1)
    rows = zip(curve.eps, pixels, curve.rounded.predictions, strict=True)
    for eps, images, predictions in rows:
        success = is_success(predictions, curve.labels, curve.targets)
        for index, image in enumerate(images if eps > 0 else ()):
            prediction = int(predictions[index])
            other = "right" if prediction == int(curve.labels[index]) else "wrong"
            outcome = "rejected" if prediction == REJECT else "evades" if success[index] else other
            path = folder / f"{name}-eps-{eps:g}-sample-{index:05d}-{outcome}.png"
            Image.fromarray(image.squeeze(-1).numpy()).save(path)
            files.append(path)
    return files
