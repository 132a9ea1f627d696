"""The options that attacks share: declared once, documented once, and refused where wrong."""

import inspect
from functools import partial
from pathlib import Path

import pytest
import torch
from attack_promises import Bumps

import torchdnr.attacks
from torchdnr.attacks import (
    EvasionOptions,
    FixedEpsOptions,
    SharedOptions,
    apgd,
    boundary_walk,
    ddn,
    fmn,
    line_search_pgd,
    multi_target,
    noise,
    orthogonal_pgd,
    pgd,
    primal_dual,
    smoothed_pgd,
    square,
    transfer,
)
from torchdnr.attacks.lowest_confidence import lowest_confidence
from torchdnr.attacks.options import DEFAULTS, options_of, resolve

MODEL = Bumps().eval()
INPUTS, LABELS = MODEL.samples(3)
FIXED_EPS = [apgd, line_search_pgd, noise, orthogonal_pgd, pgd, smoothed_pgd, square]
MINIMUM_NORM = [boundary_walk, ddn, fmn, primal_dual]
ATTACKS = [*FIXED_EPS, *MINIMUM_NORM, lowest_confidence]
each = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)


def call(attack, **options):
    """Call an attack on three inputs, with a pool or an eps, as it needs."""
    positional = {
        **dict.fromkeys(FIXED_EPS, (LABELS, 0.1)),
        **dict.fromkeys(MINIMUM_NORM, (LABELS, INPUTS)),
        lowest_confidence: (0.1,),
    }[attack]
    return attack(MODEL, INPUTS, *positional, **options)


@each
@pytest.mark.parametrize(
    ("wrong", "close"),
    [("batchsize", "batch_size"), ("sed", "seed"), ("bound", "bounds"), ("progres", "progress")],
)
def test_a_wrong_name_is_refused_and_close_ones_are_listed(attack, wrong, close):
    with pytest.raises(TypeError, match=rf"{attack.__name__} has no option '{wrong}'.*'{close}'"):
        call(attack, **{wrong: 1})


def test_close_names_are_those_of_the_attack_too():
    with pytest.raises(TypeError, match=r"pgd has no option 'step'; did you mean 'steps', .*size"):
        call(pgd, step=3)
    with pytest.raises(TypeError, match="fmn has no option 'start'; did you mean 'starts'"):
        call(fmn, start=INPUTS)
    with pytest.raises(
        TypeError, match=r"noise has no option 'xyz'; it has: objective, draws, norm"
    ):
        call(noise, xyz=3)
    composed = partial(multi_target, MODEL, INPUTS, LABELS, 0.1)
    with pytest.raises(TypeError, match="apgd has no option 'step_size'"):
        composed(attack=apgd, step_size=0.1)
    with pytest.raises(TypeError, match="pgd has no option 'restart'; did you mean 'restarts'"):
        transfer(pgd, MODEL, MODEL, INPUTS, LABELS, 0.1, restart=1)


REFUSED = {
    "norm": (3, "no norm 3; choose from: 1, 2, inf"),
    "bounds": ((1.0, 0.0), r"bounds must be \(smallest, largest\)"),
    "batch_size": (0, "batch_size must be >= 1, got 0"),
    "restarts": (-1, "restarts must be >= 0, got -1"),
    "targets": (LABELS, "other than the true ones"),
    "init_labels": (LABELS[:2], r"init_labels must be int64 \(m,\) with m = 3"),
    "start": (INPUTS[:2], r"start must have the shape \(3, 2\), got \(2, 2\)"),
    "init_inputs": (INPUTS[:, :1], "init_inputs must have the shape"),
}


SHARED = {attack: [*options_of(attack).keys() & REFUSED.keys()] for attack in ATTACKS}


@pytest.mark.parametrize(
    ("attack", "name"),
    [(attack, name) for attack, names in SHARED.items() for name in sorted(names)],
)
def test_values_out_of_range_are_refused(attack, name):
    value, message = REFUSED[name]
    options = {name: value}
    if name == "init_labels" and attack in FIXED_EPS:
        options["init_inputs"] = INPUTS
    if attack is ddn and name == "norm":
        message = "norm must be 2 for DDN, got 3"
    if name == "init_inputs" and attack in MINIMUM_NORM:  # by position
        with pytest.raises(ValueError, match=message):
            attack(MODEL, INPUTS, LABELS, value)
        return
    with pytest.raises(ValueError, match=message):
        call(attack, **options)


@each
def test_the_defaults_are_those_that_are_documented(attack):
    shared = FixedEpsOptions if attack in FIXED_EPS else EvasionOptions
    shared = SharedOptions if attack is lowest_confidence else shared
    listed = options_of(attack)
    for name in shared.__annotations__:
        assert listed[name] == DEFAULTS[name]
        assert name not in inspect.signature(attack).parameters
    assert "``" + shared.__name__ + "``" in attack.__doc__
    assert vars(resolve(attack, {})) == DEFAULTS


def test_options_are_declared_and_documented_once():
    declared = [*SharedOptions.__annotations__, *EvasionOptions.__annotations__]
    assert set(DEFAULTS) == set(FixedEpsOptions.__annotations__) >= set(declared)
    documented = "".join(one.__doc__ for one in (SharedOptions, EvasionOptions, FixedEpsOptions))
    for name in DEFAULTS:
        assert documented.count(f"        {name}: ") == 1
    sources = {path.name: path.read_text() for path in Path(torchdnr.attacks.__path__[0]).iterdir()
               if path.suffix == ".py"}  # fmt: skip
    for name in ("norm", "batch_size", "reject", "seed", "progress", "targets", "init_labels"):
        attacks = [attack.__name__ for attack in ATTACKS if f"        {name}: " in attack.__doc__]
        assert not attacks, f"{name} is described in {attacks} too"
    assert sum(text.count("Whether to show a progress bar") for text in sources.values()) == 1


@pytest.mark.parametrize("attack", [multi_target, partial(transfer, pgd, MODEL)])
def test_composed_attacks_pass_shared_options_on(attack):
    options = {"norm": 1, "bounds": (-0.5, 1.5), "batch_size": 2, "steps": 2, "seed": 1}
    points = attack(MODEL, INPUTS, LABELS, 0.2, **options)
    size = torch.linalg.vector_norm(points - INPUTS, 1, dim=1)
    assert (size > 0).any() and (size <= 0.2 + 1e-12).all()
