"""Attacks of other libraries on models that may reject, each through an adapter of torchdnr.

Every attack is a function ``run(view, inputs, labels, eps, starts) -> points`` for inputs of one
class: ``view`` is what ``torchdnr.adapters.for_label`` shows of the model, ``starts`` are accepted
inputs of other classes, one per input. Libraries are imported where they are used.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

SEED = 0

Run = Callable[[nn.Module, Tensor, Tensor, float, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """An attack of another library.

    Attributes:
        packages: What must be installed.
        run: The attack.
        minimum_norm: Whether one run, whatever its eps, serves every eps.
        settings: Its options, as recorded.
    """

    packages: tuple[str, ...]
    run: Run
    minimum_norm: bool
    settings: dict[str, Any]

    def versions(self) -> dict[str, str] | None:
        """Look up the versions of its packages, None if one is not installed."""
        try:
            return {name: version(name) for name in self.packages}
        except PackageNotFoundError:
            return None


def _foolbox(attack: str, minimum_norm: bool, far: bool, **options: Any) -> Run:  # noqa: ANN401
    def run(view: nn.Module, inputs: Tensor, labels: Tensor, eps: float, starts: Tensor) -> Tensor:
        import foolbox

        torch.manual_seed(SEED)
        shown = foolbox.PyTorchModel(view, bounds=(0, 1), device=inputs.device)
        method = getattr(foolbox.attacks, attack)(**options)
        extra = {"starting_points": starts} if far else {}
        epsilons = None if minimum_norm else eps
        return method(shown, inputs, labels, epsilons=epsilons, **extra)[1]

    return run


def _torchattacks(steps: int) -> Run:
    def run(view: nn.Module, inputs: Tensor, labels: Tensor, eps: float, starts: Tensor) -> Tensor:
        import torchattacks

        torch.manual_seed(SEED)
        method = torchattacks.PGDL2(view, eps=eps, alpha=2.5 * eps / steps, steps=steps)
        return method(inputs, labels)

    return run


def _art(steps: int) -> Run:
    def run(view: nn.Module, inputs: Tensor, labels: Tensor, eps: float, starts: Tensor) -> Tensor:
        from art.attacks.evasion import ProjectedGradientDescent
        from art.estimators.classification import PyTorchClassifier

        with torch.no_grad():
            classes = view(inputs[:1]).shape[1]
        shown = PyTorchClassifier(
            view,
            nn.CrossEntropyLoss(),
            tuple(inputs.shape[1:]),
            classes,
            clip_values=(0.0, 1.0),
            device_type="gpu" if inputs.is_cuda else "cpu",
        )
        options = {"norm": 2, "eps": eps, "eps_step": 2.5 * eps / steps, "max_iter": steps}
        method = ProjectedGradientDescent(shown, **options, batch_size=len(inputs), verbose=False)
        return torch.from_numpy(method.generate(inputs.cpu().numpy(), labels.cpu().numpy()))

    return run


def _autoattack(attack: str, queries: int | None = None) -> Run:
    def run(view: nn.Module, inputs: Tensor, labels: Tensor, eps: float, starts: Tensor) -> Tensor:
        from pyautoattack import AutoAttack

        logging.getLogger("auto-attack").setLevel(logging.ERROR)
        method = AutoAttack(
            view,
            attacks=[attack],
            version="custom",
            norm="L2",
            eps=eps,
            seed=SEED,
            device=inputs.device,
        )
        method.apgd.n_restarts = method.fab.n_restarts = 1  # as in its version "standard"
        if queries is not None:
            method.square.n_queries = queries
        return method.run_standard_evaluation(inputs, labels, batch_size=len(inputs))[0]

    return run


def peers(steps: int, queries: int) -> dict[str, Peer]:
    """Collect the attacks.

    Args:
        steps: Of every iterative attack but those of AutoAttack, which has its own, 100.
        queries: Of the square attack.

    Returns:
        Attacks by name.
    """
    found = {}
    for name, attack, minimum_norm, far, options in (
        ("foolbox L2PGD", "L2PGD", False, False, {"steps": steps, "rel_stepsize": 2.5 / steps}),
        ("foolbox FMN", "L2FMNAttack", True, False, {"steps": steps}),
        ("foolbox FMN, far starts", "L2FMNAttack", True, True, {"steps": steps}),
        ("foolbox Brendel-Bethge", "L2BrendelBethgeAttack", True, True, {"steps": steps}),
    ):
        needed = ("foolbox", "numba") if "Brendel" in name else ("foolbox",)
        run = _foolbox(attack, minimum_norm, far, **options)
        found[name] = Peer(needed, run, minimum_norm, options)
    counted = {"steps": steps}
    art = "adversarial-robustness-toolbox"
    found["torchattacks PGDL2"] = Peer(("torchattacks",), _torchattacks(steps), False, counted)
    found["ART PGD l2"] = Peer((art,), _art(steps), False, counted)
    for attack in ("apgd-ce", "apgd-t", "fab"):
        name = f"AutoAttack {attack}"
        found[name] = Peer(("pyautoattack",), _autoattack(attack), False, {"steps": 100})
    square = _autoattack("square", queries)
    found["AutoAttack square"] = Peer(("pyautoattack",), square, False, {"queries": queries})
    return found
