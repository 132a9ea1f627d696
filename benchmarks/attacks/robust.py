"""An adversarially trained MNIST network from a file of weights, bare and with DNR on it."""

from pathlib import Path

import torch
from torch import nn

from torchdnr import DNR
from torchdnr.cli.run_folder import Job

LAYERS = ("flatten", "relu3")


def robust_network(weights: Path) -> nn.Module:
    """Load a network of two convolutions and two linear layers, for 28 x 28 pixels in [0, 1].

    Args:
        weights: State dict of the eight tensors in this order, as of CNN-A, trained against
            l-infinity perturbations, of the verifier alpha-beta-CROWN.
    """
    parts = {
        "conv1": nn.Conv2d(1, 16, 4, 2, 1),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(16, 32, 4, 2, 1),
        "relu2": nn.ReLU(),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(1568, 100),
        "relu3": nn.ReLU(),
        "fc2": nn.Linear(100, 10),
    }
    net = nn.Sequential()
    for name, part in parts.items():
        net.add_module(name, part)
    stored = torch.load(weights, map_location="cpu", weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), stored.values(), strict=True)))
    return net.eval()


def robust_classifiers(job: Job, weights: Path) -> dict[str, nn.Module]:
    """Make the bare robust network, and DNR on two of its layers, fitted as in a run folder."""
    net = robust_network(weights)
    dnr = DNR(net, list(LAYERS)).fit(*job.images("svm"))
    dnr.calibrate(job.images("threshold")[0], job.settings.rejection_rate)
    return {"robust network": net, "robust DNR": dnr}
