"""Tests of export_program: a program decides as the classifier does, and runs without torchdnr."""

import subprocess
import sys

import pytest
import torch
from gpytorch.kernels import MaternKernel
from small_models import fitted, make_images, options, small_dnr, small_network
from torch import nn

import torchdnr
from torchdnr import NR, REJECT, WithReject, export_program
from torchdnr.decisions import NotFittedError


@pytest.fixture
def images():
    return make_images(30)


def assert_decides_alike(run, model, images, batches=(1, 3, 17)):
    """Compare scores relative to their scale, and labels where no tie is within rounding."""
    with torch.no_grad():
        output = model(images)
    scores, tol = output[:, :-1], 1e-4 * output.abs().max().item()
    first, second = scores.topk(2, dim=1).values.unbind(1)
    clear = torch.minimum(first - second, (first - output[:, -1]).abs()) > 2 * tol
    labels = model.predict(images)
    assert clear.float().mean() > 0.8 and len(set(labels[clear].tolist()) | {REJECT}) > 2
    assert 0 < (labels[clear] == REJECT).sum()
    for n in batches:
        got, compared = run(images[:n]), clear[:n]
        torch.testing.assert_close(got["scores"], scores[:n], rtol=0, atol=tol)
        assert got["labels"].dtype == torch.int64 and got["rejected"].dtype == torch.bool
        assert torch.equal(got["labels"][compared], labels[:n][compared])
        assert torch.equal(got["rejected"], got["labels"] == REJECT)


def test_program_decides_as_the_classifier_does(images):
    model = small_dnr(images)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    program = export_program(model, images[:1])
    assert_decides_alike(program.module(), model, images)
    assert model.net.training and not any(len(m._forward_hooks) for m in model.modules())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.net.parameters())


def test_program_has_the_gradients_of_the_classifier(images):
    model = small_dnr(images)
    leaf = images[:4].clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)
    scores = export_program(model, images).module()(leaf)["scores"]
    (got,) = torch.autograd.grad(scores[:, 0].sum(), leaf)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.slow
def test_program_runs_from_a_file_without_this_package(images, tmp_path):
    model = fitted(NR(small_network(), "logits", **options("logits", gamma=1.0)), images)
    program = export_program(model, images)
    assert all((value == 0).all() for value in program.example_inputs[0])  # no image of the user's
    torch.export.save(program, tmp_path / "nr.pt2")
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch; sys.modules['torchdnr'] = None; "
        "run = torch.export.load('nr.pt2').module(); "
        "torch.save(run(torch.load('images.pt')), 'found.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    found = torch.load(tmp_path / "found.pt")
    assert_decides_alike(lambda batch: found, model, images, batches=[30])


def test_image_out_of_range_is_rejected(images):
    run = export_program(small_dnr(images), images).module()
    assert not run(images)["rejected"].all()
    accepted = images[~run(images)["rejected"]][:3].clone()
    accepted[0, 0, 0, 0], accepted[1, 0, 0, 0] = float("nan"), -1e-6
    assert run(accepted)["labels"][:2].tolist() == [REJECT] * 2
    assert run(accepted)["rejected"].tolist() == [True, True, False]


def test_detector_beside_a_network(images):
    net = small_network().eval()
    spread = lambda x: net(x).std(dim=1)  # noqa: E731
    threshold = spread(images).median().item()
    model = WithReject(net, spread, threshold)
    got = export_program(model, images).module()(images)
    assert torch.equal(got["labels"], model.predict(images))
    assert got["rejected"].float().mean() == 0.5


def test_what_cannot_be_exported(images):
    model = NR(small_network(), "logits", **options("logits", gamma=1.0))
    with pytest.raises(NotFittedError, match="call fit"):
        export_program(model, images)
    fitted(model, images).reset_threshold()
    with pytest.raises(NotFittedError, match="threshold is not set"):
        export_program(model, images)
    with pytest.raises(ValueError, match="such as DNR or NR, got Sequential"):
        export_program(small_network(), images)
    model.set_threshold(0.0)
    model.base_svms[0] = torchdnr.RBFSVM(kernel=MaternKernel()).fit(
        model.features(images)["logits"].detach(), torch.arange(30) % 3
    )
    with pytest.raises(ValueError, match="default RBF kernel"):
        export_program(model, images)


def test_network_that_fixes_the_number_of_images(images):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 3)

        def forward(self, inputs):
            return self.linear(inputs.reshape(int(inputs.shape[0]), 64))

    model = fitted(NR(Fixed(), "linear", **options("linear")), images)
    with pytest.raises(RuntimeError, match=r"its network must keep n free"):
        export_program(model, images)
