"""Toys for the tests of attacks: nearest evasions that are known, and a small trained network."""

import math
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import nn

NORMS = (1, 2, math.inf)
DUAL = {1: math.inf, 2: 2, math.inf: 1}


class LinearBand:
    """Scores (f, -f) of f(x) = w . (x - 0.5), rejected while |f| <= theta."""

    reject_index = 2

    def __init__(self, d=12, theta=0.05, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(d, generator=generator, dtype=torch.float64).to(dtype)
        self.theta = theta

    def __call__(self, x):
        f = (x.flatten(1) - 0.5) @ self.weight
        return torch.stack([f, -f, torch.full_like(f, self.theta)], dim=1)

    def samples(self, n=40, seed=1):
        """Inputs of both classes near enough to the band for the box not to matter."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(n, len(self.weight), generator=generator, dtype=torch.float64)
        inputs = 0.5 + 0.02 * noise.to(self.weight)
        labels = (self(inputs)[:, 0] < 0).long()
        pool = 0.5 + 0.1 * torch.randn(
            60, len(self.weight), generator=generator, dtype=torch.float64
        ).to(self.weight)
        return inputs, labels, pool.clamp(0, 1)

    def optimum(self, inputs, norm):
        """Distance to the far side of the band, by Hoelder's inequality."""
        f = self(inputs)[:, 0].abs()
        return (f + self.theta) / torch.linalg.vector_norm(self.weight, DUAL[norm])


class RBFMap:
    """RBF scores of three classes around centres in the unit square, with a reject region."""

    reject_index = 3

    def __init__(self, gamma=60.0, theta=0.35, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.centers = 0.1 + 0.8 * torch.rand(12, 2, generator=generator, dtype=torch.float64)
        self.classes = torch.arange(3).repeat(4)
        self.coefs = 1.2 * torch.nn.functional.one_hot(self.classes, 3).double() - 0.4
        self.gamma, self.theta = gamma, theta

    def __call__(self, x):
        scores = torch.exp(-self.gamma * torch.cdist(x, self.centers).square()) @ self.coefs
        return torch.cat([scores, scores.new_full((len(x), 1), self.theta)], dim=1)

    def samples(self, n=60, seed=1):
        """Accepted inputs of the right class near the centres, and a pool like them."""
        generator = torch.Generator().manual_seed(seed)
        draws = self.centers.repeat(40, 1)
        draws = draws + 0.05 * torch.randn(len(draws), 2, generator=generator, dtype=torch.float64)
        labels = self.classes.repeat(40)
        output = self(draws)
        right = (output[:, :3].argmax(1) == labels) & (output[:, :3].amax(1) > self.theta)
        right &= ((draws >= 0) & (draws <= 1)).all(1)
        draws, labels = draws[right], labels[right]
        return draws[:n], labels[:n], draws[n : n + 120]

    def optimum(self, inputs, labels, norm, side=1000, finer=20):
        """Least distance to an accepted and wrong point of a fine grid over the box.

        Around the 30 best points of the grid a grid of ``finer`` times as many is searched.
        """
        axis = torch.linspace(0, 1, side, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        near = torch.linspace(-1, 1, 2 * finer + 1, dtype=torch.float64) / (side - 1)
        near = torch.cartesian_prod(near, near)
        grid, classes = self._accepted(grid)
        found = []
        for one, label in zip(inputs, labels, strict=True):
            wrong = grid[classes != label]
            distance = torch.linalg.vector_norm(wrong - one, norm, dim=1)
            best = wrong[distance.topk(30, largest=False).indices]
            fine, fine_classes = self._accepted((best[:, None] + near).view(-1, 2).clamp(0, 1))
            fine = fine[fine_classes != label]
            found.append(torch.linalg.vector_norm(fine - one, norm, dim=1).min())
        return torch.stack(found)

    def _accepted(self, points):
        best, classes = self(points)[:, :3].max(dim=1)
        return points[best > self.theta], classes[best > self.theta]


@cache
def digits():
    """A small network trained on digits of 8 x 8 pixels; 24 right images, labels, and a pool."""
    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    images = (images.float().view(-1, 1, 8, 8) / 16 * 255).round() / 255
    torch.manual_seed(0)
    parts = nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)
    net = nn.Sequential(*parts)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(150):
        rows = torch.randint(0, 1000, (100,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        right = (net(images).argmax(dim=1) == labels) & (torch.arange(len(labels)) >= 1000)
    return net.eval(), images[right][:24], labels[right][:24], images[:300]
