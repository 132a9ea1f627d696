"""What every attack promises, as checks, and a toy on which brute force finds all evasions."""

import math

import torch
from torch import nn

from torchdnr.attacks import evades
from torchdnr.attacks.objectives import decision_objective
from torchdnr.decisions import split_scores, succeeds

NORMS = (1, 2, math.inf)
EPS = {1: 0.3, 2: 0.25, math.inf: 0.2}


class Bumps(nn.Module):
    """RBF scores of three classes around centres in a box, and theta; rejects what lies far off."""

    def __init__(self, gamma=60.0, theta=0.35, dtype=torch.float64, d=2, reject=True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        centers = 0.1 + 0.8 * torch.rand(12, d, generator=generator, dtype=torch.float64)
        self.centers = nn.Parameter(centers.to(dtype))
        self.register_buffer("classes", torch.arange(3).repeat(4))
        coefs = 1.2 * nn.functional.one_hot(self.classes, 3).to(dtype) - 0.4
        self.register_buffer("coefs", coefs)
        self.dropout = nn.Dropout(0.5)  # random unless the attack sets evaluation mode
        self.gamma, self.theta = gamma, theta
        self.reject_index = 3 if reject else None
        self.rows = 0

    def forward(self, x, factor=1.0):
        self.rows += len(x)
        square = (x.flatten(1)[:, None] - self.centers).square().sum(dim=2)
        scores = self.dropout(torch.exp(-self.gamma * factor * square) @ self.coefs)
        if self.reject_index is None:
            return scores
        return torch.cat([scores, scores.new_full((len(x), 1), self.theta)], dim=1)

    def smoothed(self, factor):
        return lambda x: self(x, factor)

    def samples(self, n=40, scale=0.05):
        """Inputs near the centres that are accepted as their class, ``(n, d)``."""
        generator = torch.Generator().manual_seed(1)
        centers = self.centers.detach()
        noise = torch.randn(30, *centers.shape, generator=generator, dtype=torch.float64)
        points = (centers + scale * noise.to(centers)).flatten(0, 1)
        labels = self.classes.repeat(30)
        with torch.no_grad():
            output = self.eval()(points)
        right = (output.argmax(dim=1) == labels) & (points >= 0).all(1) & (points <= 1).all(1)
        return points[right][:n], labels[right][:n]


def blind(model):
    """Return a model without gradient, whose scores are quantised."""

    def scores(x):
        with torch.no_grad():
            return (model(x) * 512).round() / 512

    return scores


def brute_force(model, inputs, labels, eps, norm, targets=None, side=81):
    """Tell for which 2-D inputs a fine grid over the ball and the box holds an evading point."""
    axis = torch.linspace(-1, 1, side, dtype=inputs.dtype)
    moves = torch.cartesian_prod(axis, axis)
    moves = moves[torch.linalg.vector_norm(moves, norm, dim=1) <= 1]
    found = []
    for row in range(len(inputs)):
        points = inputs[row] + eps * moves
        points = points[((points >= 0) & (points <= 1)).all(dim=1)]
        classes = labels[row] if targets is None else targets[row]
        with torch.no_grad():
            output = model(points)
        rejects = output.shape[1] == 4
        good = succeeds(output, classes.expand(len(points)), rejects, targets is not None)
        found.append(good.any())
    return torch.stack(found)


def measure(model, points, labels, targets=None):
    """Return success and decision objective, by the model itself."""
    with torch.no_grad():
        output = model(points)
    classes, targeted = (labels, False) if targets is None else (targets, True)
    reject = model.reject_index is not None
    values = decision_objective(*split_scores(output, reject), classes, targeted)
    return succeeds(output, classes, reject, targeted), values


def not_worse(new, old):
    """Tell whether success, then the objective, is nowhere worse, but for rounding."""
    return ((new[0] & ~old[0]) | ((new[0] == old[0]) & (new[1] <= old[1] + 1e-6))).all()


def sizes(points, inputs, norm):
    return torch.linalg.vector_norm((points.double() - inputs.double()).flatten(1), norm, dim=1)


def check_budget(attack, norm, dtype):
    """Ball and box hold in float64, an eps of each row counts, and the input is never beaten."""
    model = Bumps(dtype=dtype).eval()
    inputs, labels = model.samples(12)
    inputs[0], inputs[1] = 0.0, 1.0  # corners of the box
    eps = torch.linspace(0, 1.5 * EPS[norm], 12, dtype=dtype)
    before = inputs.clone()
    points = attack(model, inputs, labels, eps, norm=norm)
    assert points.dtype == dtype and points.shape == inputs.shape
    assert not points.requires_grad and torch.equal(inputs, before)
    assert points.min() >= 0 and points.max() <= 1
    slack = 4 * torch.finfo(dtype).eps  # of a norm that was measured in this dtype
    assert (sizes(points, inputs, norm) <= eps.double() * (1 + slack)).all()
    assert torch.equal(points[0], inputs[0])
    assert not_worse(measure(model, points, labels), measure(model, inputs, labels))
    moved = sizes(points, inputs, norm)
    assert (moved[6:] > 0).any()


def check_targeted(attack, norm=2, share=0.8):
    """Most of the targets that brute force reaches are reached, and nothing else counts."""
    model = Bumps().eval()
    inputs, labels = model.samples()
    targets = (labels + 1) % 3
    points = attack(model, inputs, labels, EPS[norm], norm=norm, targets=targets)
    reached = measure(model, points, labels, targets)[0]
    possible = brute_force(model, inputs, labels, EPS[norm], norm, targets)
    assert 4 < possible.sum() < len(inputs)
    assert (reached & possible).sum() >= share * possible.sum()
    clean = measure(model, inputs, labels, targets)
    assert not_worse(measure(model, points, labels, targets), clean)


def check_success(attack, norm, share=0.9, gamma=60.0):
    """Most of the inputs for which brute force finds an evading point are evaded."""
    model = Bumps(gamma=gamma).eval()
    inputs, labels = model.samples()
    points = attack(model, inputs, labels, EPS[norm], norm=norm)
    evading = evades(model(points), labels, True)
    possible = brute_force(model, inputs, labels, EPS[norm], norm)
    assert 4 < possible.sum() < len(inputs)
    assert (evading & possible).sum() >= share * possible.sum()


def check_model_is_unchanged(attack):
    """The model is attacked in evaluation mode, and left in training mode as it was."""
    model = Bumps(dtype=torch.float32).eval()
    inputs, labels = model.samples(8)
    expected = attack(model, inputs, labels, 0.2)
    model.train()
    with torch.no_grad():
        assert torch.equal(attack(model, inputs, labels, 0.2), expected)
    assert model.training and model.dropout.training
    assert model.centers.requires_grad and model.centers.grad is None


def check_chunks(attack, exact=True):
    """Batches of any size give the same points, where no random number is drawn."""
    model = Bumps().eval()
    inputs, labels = model.samples(10)
    eps = torch.linspace(0.1, 0.3, 10, dtype=inputs.dtype)
    whole = attack(model, inputs, labels, eps)
    parts = attack(model, inputs, labels, eps, batch_size=3)
    if exact:
        torch.testing.assert_close(parts, whole, atol=1e-9, rtol=0)
    assert (sizes(parts, inputs, 2) <= eps * (1 + 1e-15)).all()
    assert not_worse(measure(model, parts, labels), measure(model, inputs, labels))
    most = []

    def watched(x):
        most.append(len(x))
        return model(x)

    watched.smoothed = model.smoothed
    attack(watched, inputs, labels, eps, batch_size=4, reject=True)
    assert max(most) <= 4


def check_seed(attack):
    """A seed tells the result, the global generator does not and is not touched."""
    model = Bumps().eval()
    inputs, labels = model.samples(10)
    torch.manual_seed(1)
    first = attack(model, inputs, labels, 0.2, seed=3)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(attack(model, inputs, labels, 0.2, seed=3), first)
    assert not torch.equal(attack(model, inputs, labels, 0.2, seed=4), first)
    torch.set_rng_state(state)
    attack(model, inputs, labels, 0.2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
