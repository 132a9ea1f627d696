"""Tests of calls from several threads, as in a web service: each gets what it would get alone."""

import copy
import os
import subprocess
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from gpytorch.kernels import RBFKernel
from small_models import fitted, make_images, options
from torch import nn

from torchdnr import DNR, NR, WithReject
from torchdnr.attacks import pgd
from torchdnr.decisions import evaluation_mode
from torchdnr.files import digest
from torchdnr.kernels.rbf import full_precision
from torchdnr.svm import RBFSVM

LAYERS = ["norm", "logits"]
CALLS = 100


@pytest.fixture(autouse=True)
def _frequent_switches():
    """Let threads take turns after 10 microseconds, not 5 milliseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def network():
    net = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 4, 3),
            norm=nn.BatchNorm2d(4),
            relu=nn.ReLU(inplace=True),
            dropout=nn.Dropout(0.5),
            flatten=nn.Flatten(),
            logits=nn.Linear(144, 3),
        )
    )
    net(make_images(30))  # statistics of its own
    return net


@pytest.fixture(scope="module")
def classifiers():
    torch.manual_seed(0)
    images = make_images(60)
    net = network()
    dnr = fitted(DNR(net, LAYERS, **options(*LAYERS, "combiner")), images)
    nr = fitted(NR(net, "norm", **options("norm")), images)
    with_reject = WithReject(net, lambda x: x.flatten(1).std(dim=1), 0.3)
    return {"DNR": dnr, "NR": nr, "WithReject": with_reject}


def batches():
    return [make_images(3) for _ in range(CALLS)]


def at_once(function, items, threads):
    """Apply a function to all items from so many threads."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def state_of(model):
    return digest(model.state_dict()), [module.training for module in model.modules()]


def assert_as_from_one_thread(model, function, threads, items):
    expected, before = [function(item) for item in items], state_of(model)
    got = at_once(function, items, threads)
    assert state_of(model) == before  # batch-norm statistics among them
    wrong = sum(not torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    assert wrong == 0, f"{wrong} of {len(items)} calls got something else than from one thread"
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("threads", [pytest.param(4, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["DNR", "NR"])
def test_scores_are_those_of_one_thread(classifiers, kind, training, threads):
    model = classifiers[kind].train(training)
    assert_as_from_one_thread(model, torch.no_grad()(model), threads, batches())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["DNR", "NR"])
def test_gradients_are_those_of_one_thread(classifiers, kind, training):
    model = classifiers[kind].train(training)

    def gradient(images):
        leaf = images.clone().requires_grad_()
        return torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)[0]

    assert_as_from_one_thread(model, gradient, 4, batches())


@pytest.mark.parametrize("kind", ["DNR", "WithReject"])
def test_predictions_of_a_network_in_training_mode_are_those_of_one_thread(classifiers, kind):
    model = classifiers[kind].train()
    assert_as_from_one_thread(model, model.predict, 8, batches())


def test_two_classifiers_on_one_network_do_not_meet(classifiers):
    dnr, nr = (classifiers[kind].train() for kind in ("DNR", "NR"))
    items = list(enumerate(batches()))

    @torch.no_grad()
    def scores(item):
        return (nr if item[0] % 2 else dnr)(item[1])

    assert_as_from_one_thread(dnr, scores, 4, items)


def test_plain_calls_of_the_network_from_other_threads_are_not_taken_for_features(classifiers):
    model = classifiers["DNR"].eval()
    items = list(enumerate(batches()))

    @torch.no_grad()
    def run(item):
        return (model.net if item[0] % 2 else model)(item[1])

    assert_as_from_one_thread(model, run, 4, items)


def test_attacks_are_those_of_one_thread(classifiers):
    model = classifiers["DNR"].train()
    labels = torch.arange(6) % 3

    def attack(images):
        return pgd(model, images, labels, 0.2, norm=torch.inf, steps=4)

    assert_as_from_one_thread(model, attack, 4, [make_images(6) for _ in range(24)])


def test_a_module_is_put_back_when_the_last_block_that_needs_it_ends():
    net, started, ended = network().train(), Barrier(2), Barrier(2)

    def first():
        with evaluation_mode(net):
            started.wait()
        ended.wait()

    def second():
        with evaluation_mode(net):
            started.wait()
            ended.wait()
            return [module.training for module in net.modules()]

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.submit(first), pool.submit(second)
        one.result()
        assert not any(two.result())
    assert all(module.training for module in net.modules())


def test_a_mode_that_is_set_while_a_block_runs_is_not_lost():
    net = network().eval()
    with evaluation_mode(net):
        net.norm.train()  # not one that the block has switched
        with evaluation_mode(net):
            assert not net.norm.training
        assert net.norm.training
    assert [name for name, module in net.named_modules() if module.training] == ["norm"]
    net.train()
    with evaluation_mode(net):
        net.train()  # as another thread may
        with evaluation_mode(net):
            assert not any(module.training for module in net.modules())
    assert all(module.training for module in net.modules())


def test_full_precision_lasts_until_the_last_thread_is_done():
    switch, started, ended = torch.backends.cuda.matmul, Barrier(2), Barrier(2)
    before, cpu = switch.fp32_precision, torch.device("cpu")

    def first():
        with full_precision(cpu):
            started.wait()
        ended.wait()

    def second():
        started.wait()
        with full_precision(cpu):
            ended.wait()
            return switch.fp32_precision

    def after_first():
        with full_precision(cpu):
            started.wait()
            ended.wait()
            return switch.fp32_precision

    try:
        switch.fp32_precision = "tf32"
        for later in (second, after_first):
            with ThreadPoolExecutor(2) as pool:
                one, two = pool.submit(first), pool.submit(later)
                one.result()
                assert two.result() == "ieee"
            assert switch.fp32_precision == "tf32"
    finally:
        switch.fp32_precision = before


def test_kernels_of_gpytorch_score_in_threads_as_in_one():
    features = torch.randn(60, 6)
    kernel = RBFKernel(active_dims=(0, 2))
    kernel.lengthscale = 0.5
    svm = RBFSVM(kernel=kernel).fit(features, torch.arange(60) % 3)
    items = list(torch.randn(400, 4, 6))
    assert_as_from_one_thread(svm, torch.no_grad()(svm), 4, items)


def test_a_copy_made_while_others_score_scores_the_same(classifiers):
    model = classifiers["DNR"].eval()
    images = make_images(6)
    expected = model(images).detach()

    @torch.no_grad()
    def copied(number):
        return (copy.deepcopy(model) if number % 10 == 0 else model)(images)

    for got in at_once(copied, range(100), 4):
        assert torch.equal(got, expected)


def test_a_copy_made_while_others_score_keeps_none_of_their_hooks(classifiers):
    model, images = classifiers["DNR"].eval(), make_images(6)

    def copied(number):
        return copy.deepcopy(model) if number % 5 == 0 else model(images)

    copies = at_once(copied, range(200), 4)[::5]
    assert not any(module._forward_hooks for one in copies for module in one.modules())


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_classifier_scores_in_threads_as_in_one(classifiers, training):
    torch.compiler.reset()
    model = classifiers["DNR"].train(training)
    compiled = torch.compile(model, backend="aot_eager")
    assert_as_from_one_thread(model, torch.no_grad()(compiled), 4, batches())
    torch.compiler.reset()


class InAThreadOfItsOwn(nn.Module):
    """A network that runs its layers elsewhere, as ``nn.DataParallel`` does on several GPUs."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.net, images).result()


def test_a_network_may_run_its_layers_in_a_thread_of_its_own(classifiers):
    net, images = network().eval(), make_images(42)
    layers = [f"net.{name}" for name in LAYERS]
    inside = fitted(DNR(InAThreadOfItsOwn(net), layers, **options(*layers, "combiner")), images)
    expected = fitted(DNR(net, LAYERS, **options(*LAYERS, "combiner")), images)
    with torch.no_grad():
        assert torch.equal(inside.scores(images), expected.scores(images))


AT_TORCH = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise SystemExit(os.environ["OMP_WAIT_POLICY"])

sys.meta_path.insert(0, Watch())
import {module}
"""


@pytest.mark.parametrize("given", [None, "ACTIVE"])
@pytest.mark.parametrize(
    "module", ["train", "attack", "torchdnr.cli.__main__", "torchdnr.predict", "torchdnr"]
)
def test_threads_that_wait_sleep_unless_the_user_wants_otherwise(module, given):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    command = [sys.executable, "-c", AT_TORCH.format(module=module)]
    root = Path(__file__).parents[1]
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert ended.stderr.strip() == (given or "PASSIVE")  # when PyTorch is about to be loaded
