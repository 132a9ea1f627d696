"""Draw Fig. 2 of the paper for a toy: attacks on an RBF-SVM with a reject option.

`python -m benchmarks.paper.toy_2d` fits NR on three classes of the plane, attacks one sample with
the paper's attack from the sample alone, with its second start, and by the boundary walk, and
writes benchmarks/results/paper/fig2.png and fig2.json.
"""

import json

import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS as ALL_RESULTS
from benchmarks.paper.plane import plot_plane
from torchdnr import NR
from torchdnr.attacks import boundary_walk, evades, line_search_pgd
from torchdnr.evaluation.environment import describe_environment
from torchdnr.files import atomic_write_bytes

RESULTS = ALL_RESULTS / "paper"
CENTERS = ((0.25, 0.3), (0.72, 0.3), (0.5, 0.75))
EPS = 0.42
STEPS = 20  # that are drawn, at the most
SOURCE = (0.27, 0.36)


def make_samples(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw points of three Gaussian classes in the unit square, ``(n, 2)``, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % len(CENTERS)
    noise = 0.075 * torch.randn(n, 2, generator=generator)
    return (torch.tensor(CENTERS)[labels] + noise).clamp(0, 1), labels


def walked(model: nn.Module, source: Tensor, label: Tensor) -> Tensor:
    """Follow the paper's attack: what it has found after 0, 1, 2, ... steps, ``(k, 2)``."""
    points = [source]
    for steps in range(1, STEPS + 1):
        points.append(line_search_pgd(model, source, label, EPS, steps=steps))
        if torch.equal(points[-1], points[-2]):
            break
    return torch.cat(points)


def main() -> None:
    """Fit, attack, and write the figure and the numbers."""
    samples, labels = make_samples(240, seed=0)
    model = NR(nn.Sequential(nn.Flatten()), "0", hyperparameters={"0": (1.0, 40.0)})
    model.fit(samples, labels)
    model.calibrate(make_samples(600, seed=1)[0], rejection_rate=0.05)
    source, label = torch.tensor([SOURCE]), torch.tensor([0])
    found = {
        "Eq. 2 from the source": line_search_pgd(model, source, label, EPS),
        "Eq. 2, second start": line_search_pgd(model, source, label, EPS, init_inputs=samples),
        "boundary walk": boundary_walk(model, source, label, samples),
    }
    points = {name: point[0] for name, point in found.items()}
    path = walked(model, source, label)
    plot_plane(
        RESULTS / "fig2.png",
        model,
        samples,
        labels,
        source[0],
        0,
        points,
        EPS,
        paths={"path of the first": path},
    )
    numbers = {
        "environment": describe_environment("cpu"),
        "eps": EPS,
        "path": path.tolist(),
        "threshold": model.threshold.item(),
        "attacks": {
            name: {
                "point": point[0].tolist(),
                "norm": (point - source).norm().item(),
                "accepted and wrong": bool(evades(model(point), label, True)),
            }
            for name, point in found.items()
        },
    }
    text = json.dumps(numbers, indent=1) + "\n"
    atomic_write_bytes(RESULTS / "fig2.json", text.encode())
    print(text)


if __name__ == "__main__":
    main()
