from dataclasses import replace

import pytest
import torch
from small_models import fitted, make_images, once, options, small_network
from torch import nn

from torchdnr import DNR, NR, Adversary
from torchdnr.attacks import pgd
from torchdnr.decisions import NotFittedError, evades
from torchdnr.models import ADVERSARIAL_TRAINING
from torchdnr.rejection.end_to_end import ScaledMargins, trainable

QUICK = replace(ADVERSARIAL_TRAINING, epochs=2, batch_size=30, lr=5e-3)
AGAINST = Adversary(eps=0.4, steps=3)


def network():
    net = small_network()
    net.dropout.p = 0.0
    return nn.Sequential(net[:-1], nn.Linear(144, 12), nn.ReLU(), nn.Linear(12, 3))


def digits(n=60):
    torch.manual_seed(0)
    return make_images(n), torch.arange(n) % 3


def dnr(images):
    torch.manual_seed(0)
    return _dnr(images)


@once
def _dnr(images):
    return fitted(DNR(network(), ["2", "3"], **options("2", "3", "combiner")), images)


def nr(images):
    torch.manual_seed(0)
    known = {"hyperparameters": {"3": (10.0, 1e-2)}}
    return fitted(NR(network(), "3", **known), images)


@pytest.fixture(scope="module")
def trained():
    images, labels = digits()
    model = dnr(images)
    given = model.net
    before = {name: value.clone() for name, value in given.state_dict().items()}
    model.fit_end_to_end(images, labels, AGAINST, QUICK)
    return model, given, before


def test_the_given_network_is_left_as_it_was(trained):
    model, given, before = trained
    assert model.net is not given
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
    assert not all(torch.equal(v, before[name]) for name, v in model.net.state_dict().items())
    assert all(p.requires_grad for p in model.net.parameters())


def test_its_form_is_that_of_a_fitted_classifier(trained):
    model, *_ = trained
    fresh = dnr(digits()[0])
    state, others = model.state_dict(), fresh.state_dict()
    assert {n: v.shape for n, v in state.items()} == {n: v.shape for n, v in others.items()}
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters == {name for name, _ in fresh.named_parameters()}
    assert not any(p.requires_grad for p in model.svms.parameters())
    for name in ("support_vectors", "dual_coef", "intercept"):
        assert not torch.equal(getattr(model.combiner, name), getattr(fresh.combiner, name))
    assert model.selection["2"]["gamma"] != 1e-2
    assert model.selection["2"]["end_to_end"]["eps"] == 0.4


def test_its_threshold_is_dropped(trained):
    model, *_ = trained
    with pytest.raises(NotFittedError, match="calibrate"):
        dropped = dnr(digits()[0])
        dropped.rejection.reset()
        dropped(digits()[0])
    assert model.threshold.isnan()


def test_a_saved_one_has_the_same_scores_on_any_network_of_its_architecture(trained, tmp_path):
    model, given, _ = trained
    path, images = tmp_path / "dnr.safetensors", digits()[0]
    model.save(path)
    other = network()
    weights = other.state_dict()["3.weight"].clone()
    loaded = DNR.load(path, other)
    assert torch.equal(loaded.scores(images), model.scores(images))
    assert torch.equal(other.state_dict()["3.weight"], weights)  # a copy got the file's weights
    loaded.save(path)  # and saves them again
    assert torch.equal(DNR.load(path, given).scores(images), model.scores(images))
    with pytest.raises(ValueError, match="does not fit"):
        DNR.load(path, small_network())


def test_a_state_dict_brings_the_trained_network_into_files_too(trained, tmp_path):
    model, given, _ = trained
    path, images = tmp_path / "dnr.safetensors", digits()[0]
    plain = network()
    plain.load_state_dict(given.state_dict())
    fresh = DNR(plain, ["2", "3"])
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.scores(images), model.scores(images))
    fresh.save(path)
    assert torch.equal(DNR.load(path, given).scores(images), model.scores(images))
    again = DNR(given, ["2", "3"])
    again.load_state_dict(dnr(images).state_dict())  # the network has these weights already
    assert not again.owns_network


def test_a_smoothed_and_a_compressed_one_know_the_trained_network(trained, tmp_path):
    model, *_ = trained
    images = digits()[0]
    assert model.smoothed(0.5).scores(images).isfinite().all()
    small = model.compress(images, 6, steps=3, joint_steps=3)
    small.save(tmp_path / "small.safetensors")
    loaded = DNR.load(tmp_path / "small.safetensors", network())
    assert torch.equal(loaded.scores(images), small.scores(images))


@pytest.mark.parametrize("make", [dnr, pytest.param(nr, marks=pytest.mark.slow)])
def test_training_takes_evasions_away(make):
    images, labels = digits(90)
    model = make(images)

    def evading():
        points = pgd(model, images, labels, 0.4, init_inputs=images)
        return evades(model(points), labels, reject=True).float().mean()

    before = evading()
    model.fit_end_to_end(images, labels, replace(AGAINST, steps=5), replace(QUICK, epochs=12))
    model.calibrate(images, 0.1)
    assert before > 0.2
    assert evading() < 0.7 * before


def test_a_frozen_network_stays_and_is_not_saved(tmp_path):
    images, labels = digits()
    model = dnr(images)
    given, before = model.net, model.scores(images).detach()
    model.fit_end_to_end(images, labels, AGAINST, QUICK, freeze_network=True)
    assert model.net is given
    assert all(p.requires_grad for p in given.parameters())
    assert not torch.equal(model.scores(images), before)
    model.save(tmp_path / "dnr.safetensors")
    with pytest.raises(ValueError, match="other weights"):
        DNR.load(tmp_path / "dnr.safetensors", network())
    assert torch.equal(
        DNR.load(tmp_path / "dnr.safetensors", given).scores(images), model.scores(images)
    )


def test_the_network_itself_is_trained_if_asked_for():
    images, labels = digits()
    model = dnr(images)
    given, weights = model.net, model.net[3].weight.detach().clone()
    model.fit_end_to_end(images, labels, AGAINST, QUICK, copy_network=False)
    assert model.net is given
    assert not torch.equal(given[3].weight, weights)


def test_a_stopped_training_goes_on_and_a_loader_does_as_well(tmp_path):
    images, labels = digits()
    whole = dnr(images).fit_end_to_end(images, labels, AGAINST, QUICK)
    path = tmp_path / "training.safetensors"
    stopped = dnr(images)
    before = stopped(images)
    calls = 0

    def stop(module, args):
        nonlocal calls
        calls += 1
        if calls > 16:  # in the second of two epochs
            raise KeyboardInterrupt

    handle = stopped.net.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit_end_to_end(images, labels, AGAINST, QUICK, checkpoint=path)
    handle.remove()
    assert path.exists()
    assert torch.equal(stopped(images), before)  # as it was, with the threshold that fits
    loader = [(images[:20], labels[:20]), (images[20:], labels[20:])]
    goes_on = dnr(images).fit_end_to_end(loader, None, AGAINST, QUICK, checkpoint=path)
    assert torch.equal(goes_on.scores(images), whole.scores(images))


def test_gradients_of_network_and_svms_are_exact():
    torch.manual_seed(0)
    images = make_images(15)
    model = dnr(images).double()
    margins = ScaledMargins(model, 0.1).double()
    few = images[:2].double()
    with trainable([*model.base_svms, model.combiner]):
        parameters = {
            name: p for name, p in margins.named_parameters() if p.requires_grad and p.numel() < 500
        }
        kinds = ("support_vectors", "dual_coef", "intercept", "lengthscale", "scale", "net")
        assert all(any(kind in name for name in parameters) for kind in kinds)

        def scores(*values):
            given = dict(zip(parameters, values, strict=True))
            return torch.func.functional_call(margins, given, (few,))

        assert torch.autograd.gradcheck(scores, tuple(parameters.values()), fast_mode=True)


def test_what_cannot_be_trained_is_refused():
    images, labels = digits()
    model = dnr(images)
    with pytest.raises(ValueError, match="Adversary"):
        model.fit_end_to_end(images, labels)
    with pytest.raises(ValueError, match='"reject" or "plain"'):
        model.fit_end_to_end(images, labels, Adversary(eps=1, loss="class"))
    with pytest.raises(ValueError, match="labels"):
        model.fit_end_to_end(images, None, AGAINST)
    with pytest.raises(NotFittedError):
        DNR(network(), ["3"]).fit_end_to_end(images, labels, AGAINST)


@pytest.mark.parametrize("freeze", [False, True])
def test_a_checkpoint_of_the_other_kind_is_refused(tmp_path, freeze):
    images, labels = digits()
    path, once = tmp_path / "training.safetensors", replace(QUICK, epochs=1)
    dnr(images).fit_end_to_end(
        images, labels, AGAINST, once, freeze_network=freeze, checkpoint=path
    )
    model = dnr(images)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    with pytest.raises(ValueError, match="freeze_network"):
        model.fit_end_to_end(
            images, labels, AGAINST, once, freeze_network=not freeze, checkpoint=path
        )
    assert all(torch.equal(v, before[name]) for name, v in model.net.state_dict().items())


@pytest.mark.parametrize("freeze", [False, True])
def test_every_module_stays_in_its_mode(freeze):
    images, labels = digits()
    model = dnr(images)
    model.net[0].train()
    model.net[1].eval()
    before = {name: module.training for name, module in model.net.named_modules()}
    once = replace(QUICK, epochs=1)
    model.fit_end_to_end(images, labels, AGAINST, once, freeze_network=freeze)
    assert {name: module.training for name, module in model.net.named_modules()} == before


def test_a_network_that_cannot_be_trained_is_refused():
    images, labels = digits()
    model = dnr(images)
    model.net.requires_grad_(False)
    with pytest.raises(ValueError, match="freeze_network=True"):
        model.fit_end_to_end(images, labels, AGAINST, QUICK)


def test_a_saved_one_is_loaded_onto_a_wrapped_network_too(trained, tmp_path):
    model, given, _ = trained
    model.save(tmp_path / "dnr.safetensors")
    wrapped = DNR.load(tmp_path / "dnr.safetensors", nn.DataParallel(given))
    assert torch.equal(wrapped.scores(digits()[0]), model.scores(digits()[0]))
