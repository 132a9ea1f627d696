"""A small network trained on real digits, DNR on it, and how its decisions are read."""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchdnr import DNR
from torchdnr.attacks import evades
from torchdnr.attacks.starts import nearest_other_class
from torchdnr.data import load_dataset, split

TESTED = 16


class Victim(NamedTuple):
    """What is attacked."""

    model: DNR
    inputs: Tensor
    labels: Tensor
    pool: Tensor
    pool_labels: Tensor

    def evading(self, points):
        """Tell which points are accepted and wrong: our own judgement."""
        with torch.no_grad():
            return evades(self.model(points), self.labels, reject=True)

    def rejected(self, points):
        return self.model.predict(points) == -1

    def far_starts(self):
        """Return the nearest pool sample that is accepted as another class, for each input."""
        classes = self.model.predict(self.pool)
        found, usable = nearest_other_class(self.inputs, self.labels, self.pool, classes, 1)
        assert usable.all()
        return self.pool[found[:, 0]]


def small_network():
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 8, 5, stride=2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(8, 16, 5, stride=2),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc=nn.Linear(256, 64),
            relu3=nn.ReLU(),
            logits=nn.Linear(64, 10),
        )
    )


def make_victim():
    torch.manual_seed(0)
    data = load_dataset("mnist-5k")
    parts = split(data, network=1500, svm=600, threshold=400, test=200, seed=0)
    images, labels = data.select(parts.network)
    net = small_network()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(6):
        for rows in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
    net.eval()
    options = {"C_grid": (10.0,), "gamma_grid": (1.0,), "folds": 2, "stacking_folds": 2}
    model = DNR(net, ["relu3", "logits"], **options).eval()
    pool, pool_labels = data.select(parts.svm)
    model.fit(pool, pool_labels)
    model.calibrate(data.select(parts.threshold)[0], rejection_rate=0.1)
    inputs, labels = data.select(parts.test)
    assert (model.predict(inputs) == labels).float().mean() > 0.75  # rejects are errors here
    return Victim(model, inputs[:TESTED], labels[:TESTED], pool, pool_labels)
