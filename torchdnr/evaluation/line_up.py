"""The attacks of an evaluation: never one alone, as each has a weakness that flatters a defence."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from torchdnr.attacks.apgd import apgd
from torchdnr.attacks.boundary_walk import boundary_walk
from torchdnr.attacks.ddn import ddn
from torchdnr.attacks.fmn import fmn
from torchdnr.attacks.line_search import line_search_pgd
from torchdnr.attacks.multi_target import multi_target
from torchdnr.attacks.noise import noise
from torchdnr.attacks.options import options_of
from torchdnr.attacks.orthogonal import orthogonal_pgd
from torchdnr.attacks.pgd import pgd
from torchdnr.attacks.primal_dual import primal_dual
from torchdnr.attacks.smoothing import FACTORS, smoothed_pgd
from torchdnr.attacks.square import square
from torchdnr.attacks.transfer import transfer
from torchdnr.decisions import method_of
from torchdnr.files import digest

LINE_SEARCH_PGD = "line-search PGD"
BOUNDARY_WALK = "boundary walk"
DEFAULT, FULL = "default", "full"
# What an attack is given with the inputs, and what does not change its points. It always goes on
# from given points, at first the inputs, so that no run begins at random.
_GIVEN = {
    *("start", "init_inputs", "init_labels", "eps", "batch_size", "progress"),
    *("mask", "targets", "levels"),
    *("attack", "surrogate", "smoothed", "random_start"),
}


class Passes(NamedTuple):
    """Inputs sent through a model, per input that is attacked or in all."""

    forwards: float
    backwards: float


_UNKNOWN = Passes(100, 100)  # those of an attack that does not tell


@dataclass(frozen=True)
class Attack:
    """An attack of the line-up.

    Attributes:
        run: ``run(model, inputs, labels, eps, start) -> points``, each within ``eps`` of its
            input, from ``start``. Of ``mask``, ``targets`` and ``levels`` it is given by name what
            the evaluation has, for these samples, and with a ``pool`` its classes ``init_labels``.
        minimum_norm: Whether the points are the nearest evading ones, whatever their norm: ``run``
            is called once, with an infinite ``eps``, and serves every eps.
        settings: Every option that changes the points, seed included: stored with the results,
            and what a checkpoint has of it is only used if they are the same.
        needs: Name of a method without which a model cannot be attacked like this: it is left out.
        fingerprint: Digests of the tensors that the points depend on beside the inputs, for the
            same purpose.
        every_eps: Whether it is called at every eps, with the samples that do not evade at a
            smaller one and their points there, at first the inputs, so that it has a curve of its
            own. Otherwise, beside minimum-norm attacks, it only looks for points nearer than those
            of the others: ``eps`` is ``(n,)`` then, just below the smallest norm of each sample.
        pool: Inputs from which it starts, ``(m, ...)``, if it takes the classes that the model
            assigns to them, ``init_labels``: they are then found once, not in each call. Where it
            only looks for points nearer than those of the others, which have started there, it is
            given ``init_inputs=None`` instead, unless there is a mask.
        passes: About how many one call takes per sample, to estimate the time beforehand.
    """

    run: Callable[..., Tensor]
    minimum_norm: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: str | None = None
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    every_eps: bool = True
    pool: Tensor | None = None
    passes: Passes = _UNKNOWN

    def fits(self, model: object) -> bool:
        """Tell whether a model has what the attack needs."""
        return self.needs is None or method_of(model, self.needs) is not None


def _descents(options: Mapping[str, Any], forwards: int = 1, backwards: int = 1) -> Passes:
    """Count a descent from the input, one of some samples from the pool, and the restarts.

    ``forwards`` and ``backwards`` are those of a step.
    """
    steps = options["steps"] * (1.5 + options["restarts"])
    return Passes(steps * forwards + 14, steps * backwards)


def _near_descents(options: Mapping[str, Any]) -> Passes:
    """Count descents from the input and from each start, and what finds the starts."""
    starts = options["starts"] * (1 + options["restarts"])
    steps = options["steps"] * (1 + starts)
    return Passes(steps + 2 * options["neighbours"] + 30 * starts, steps)


def _walks(options: Mapping[str, Any]) -> Passes:
    """Count walks, most of which end early, and what finds their starts."""
    rounds, starts = 1 + options["restarts"], options["starts"]
    steps = options["steps"] * starts / 5
    return Passes(rounds * (steps + options["neighbours"] + 9 * starts), rounds * steps)


def _line_searches(options: Mapping[str, Any]) -> Passes:
    """Count descents that stop halfway on average, with the trials of each step, a third of all."""
    steps = options["steps"] * (2 + options["restarts"]) / 2
    return Passes(steps * (2 + options["doublings"] / 3), steps)


class Entry(NamedTuple):
    """An attack that can be chosen by name."""

    label: str  # its name in results, tables and figures
    attack: Callable[..., Tensor]
    help: str
    minimum_norm: bool = False  # whether it finds the nearest evading points
    every_eps: bool = False  # see ``Attack``
    options: Mapping[str, Any] = MappingProxyType({})  # where they are not the defaults
    inner: Callable[..., Tensor] | None = None  # run within it, whose options it has as well
    without: frozenset[str] = frozenset()  # options, inner or shared, that it cannot be given
    needs: str | None = None  # see ``Attack``
    passes: Callable[[Mapping[str, Any]], Passes] = _descents  # ``Attack.passes`` by its options

    @property
    def defaults(self) -> dict[str, Any]:
        """Its options, as far as they change its points, with the values they have if not given."""
        names = self.accepts - _GIVEN
        options = {} if self.inner is None else options_of(self.inner)
        options |= options_of(self.attack)
        return {key: value for key, value in options.items() if key in names} | dict(self.options)

    @property
    def accepts(self) -> set[str]:
        """Names of everything that it can be given."""
        both = [self.attack] if self.inner is None else [self.inner, self.attack]
        names = (signature(one).parameters.keys() | options_of(one).keys() for one in both)
        return set().union(*names) - self.without


ATTACKS = {
    "line-search-pgd": Entry(
        LINE_SEARCH_PGD,
        line_search_pgd,
        "the paper's: descent with a line search, from the image and from another class",
        every_eps=True,
        options={"objective": "paper", "early_stop": True},
        passes=_line_searches,
    ),
    "boundary-walk": Entry(
        BOUNDARY_WALK,
        boundary_walk,
        "a walk to the image from accepted ones",
        minimum_norm=True,
        # Other starts and other first steps lead to other valleys, more of them than more starts.
        options={"starts": 16, "neighbours": 18, "restarts": 2},
        passes=_walks,
    ),
    "apgd": Entry("APGD", apgd, "descent with momentum and steps that adapt"),
    "apgd-multi-target": Entry(
        "multi-target APGD",
        multi_target,
        "APGD towards each other class in turn",
        inner=apgd,
        passes=partial(_descents, forwards=9, backwards=9),  # of ten classes
    ),
    "pgd": Entry("PGD", pgd, "plain projected descent"),
    "primal-dual": Entry(
        "primal-dual",
        primal_dual,
        "nearest evasion: pull to the image against push into a class",
        minimum_norm=True,
        passes=_near_descents,
    ),
    "fmn": Entry(
        "FMN",
        fmn,
        "nearest evasion: a radius that adapts",
        minimum_norm=True,
        passes=_near_descents,
    ),
    "ddn": Entry(
        "DDN",
        ddn,
        "nearest evasion: direction, then norm; l2 only",
        minimum_norm=True,
        without=frozenset({"norm"}),
        passes=_near_descents,
    ),
    "selective-pgd": Entry(
        "selective PGD",
        orthogonal_pgd,
        "first to another class, then to be accepted",
        options={"projected": "none", "selective": True},
        passes=partial(_descents, backwards=2),
    ),
    "orthogonal-pgd": Entry(
        "orthogonal PGD",
        orthogonal_pgd,
        "to another class and to be accepted at once, along gradients that do not disturb",
        passes=partial(_descents, backwards=2),
    ),
    "smoothed-pgd": Entry(
        "smoothed PGD",
        smoothed_pgd,
        "on wider kernels first, for NR and DNR",
        needs="smoothed",
        passes=partial(_descents, forwards=len(FACTORS), backwards=len(FACTORS)),
    ),
    "square": Entry(
        "Square",
        square,
        "random search, without gradients",
        passes=lambda options: Passes(options["queries"] * (2 + options["restarts"]), 0),
    ),
    "transfer": Entry(
        "transfer",
        transfer,
        "made on the network, tried on the others",
        inner=pgd,
        # it goes through several objectives of its own, and the classes are another model's
        without=frozenset({"objective", "init_labels"}),
        passes=partial(_descents, forwards=2, backwards=2),  # of the network, for two objectives
    ),
    "noise": Entry(
        "noise",
        noise,
        "random points: what any attack has to beat",
        passes=lambda options: Passes(options["draws"] * (2 + options["restarts"]), 0),
    ),
}
"""Attacks by the names that the command line knows, in the order in which they run."""

DEFAULT_ATTACKS = "line-search-pgd", "boundary-walk", "apgd"


def choose_attacks(names: Iterable[str], norm: float = 2, surrogate: bool = True) -> list[str]:
    """Resolve names, "default" and "full" to attacks, each once, in the order in which they run.

    "full" are those attacks that can use the norm, and that have a surrogate if they need one.
    """
    usable = [name for name in ATTACKS if _problem(name, norm, surrogate) is None]
    groups = {DEFAULT: DEFAULT_ATTACKS, FULL: usable}
    wanted: set[str] = set()
    for name in names:
        if name not in ATTACKS and name not in groups:
            choices = ", ".join([*groups, *ATTACKS])
            raise ValueError(f"no attack {name!r}; choose from: {choices}")
        for single in groups.get(name, [name]):
            if problem := _problem(single, norm, surrogate):
                raise ValueError(f"{single} {problem}; choose from: {', '.join(usable)}")
            wanted.add(single)
    if not wanted:
        raise ValueError("no attack is named: give at least one, or 'default'")
    return [name for name in ATTACKS if name in wanted]


def _problem(name: str, norm: float, surrogate: bool) -> str | None:
    has = ATTACKS[name].accepts
    if "norm" not in has and norm != 2:
        return f"is for the l2 norm only, got {norm}"
    if "surrogate" in has and not surrogate:
        return "needs a surrogate, a classifier without a reject option"
    return None


def default_line_up(init_inputs: Tensor, **options: Any) -> dict[str, Attack]:  # noqa: ANN401
    """Build the default line-up: the paper's attack, a walk from the far side, and APGD.

    The line-search PGD descends on the paper's objective, from the input and from an accepted
    input of another class that is projected on the ball; it stalls where scores are flat or
    kinked. The boundary walk starts at accepted inputs of other classes and comes nearer. APGD
    descends from the same places as the first, on what decides about evasion.

    Args:
        init_inputs: Inputs from which the attacks may start, ``(m, ...)``.
        **options: See ``build_line_up``.

    Returns:
        Attacks by the names that results have for them.
    """
    return build_line_up([DEFAULT], init_inputs, **options)


def build_line_up(
    names: Iterable[str],
    init_inputs: Tensor,
    *,
    norm: float = 2,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int | None = None,
    reject: bool | None = None,
    progress: bool = False,
    surrogate: Callable[[Tensor], Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    own_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Attack]:
    """Build a line-up of the attacks of the given names.

    Args:
        names: Keys of ``ATTACKS``, "default" or "full".
        init_inputs: Inputs from which attacks may start on the far side, ``(m, ...)``.
        norm: Norm of the perturbation; 1, 2 or infinity.
        bounds: Smallest and largest value of an input.
        batch_size: Inputs per batch; None: as many as suits their size.
        reject: Whether the last column of the output is theta; None: ask the model.
        progress: Whether to show progress bars.
        surrogate: Classifier without a reject option, for the attacks that need one: the transfer.
        options: Options of all attacks that have them: objective, steps, restarts, seed.
        own_options: Options of single attacks, by their names.

    Returns:
        Attacks by the names that results have for them, each once.

    Raises:
        ValueError: If a name or norm is unknown, or an attack cannot do what is asked for.
    """
    own_options = dict(own_options or {})
    chosen = choose_attacks(names, norm, surrogate is not None)
    if unknown := own_options.keys() - ATTACKS.keys():
        raise ValueError(f"no attack {sorted(unknown)}; choose from: {', '.join(ATTACKS)}")
    shared = {"norm": norm, "bounds": bounds, "reject": reject, **(options or {})}
    given: dict[str, Any] = {
        "init_inputs": init_inputs,
        "batch_size": batch_size,
        "progress": progress,
    }
    given |= {"surrogate": surrogate, "progress": progress}
    fingerprint = {"init_inputs": digest({"init_inputs": init_inputs})}
    if isinstance(surrogate, nn.Module):
        fingerprint["surrogate"] = digest(surrogate.state_dict())
    line_up = {}
    for name in chosen:
        entry = ATTACKS[name]
        settings = entry.defaults
        settings |= {key: value for key, value in shared.items() if key in entry.accepts}
        settings |= own_options.get(name, {})
        extra = {key: value for key, value in given.items() if key in entry.accepts}
        if entry.inner is not None:
            extra["attack"] = entry.inner
        run = _runner(entry, {**settings, **extra})
        line_up[entry.label] = Attack(
            run,
            entry.minimum_norm,
            settings,
            entry.needs,
            fingerprint,
            entry.every_eps,
            passes=entry.passes(settings),
            pool=init_inputs if {"init_inputs", "init_labels"} <= entry.accepts else None,
        )
    return line_up


def _runner(entry: Entry, options: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Give an attack with its options the signature of ``Attack.run``."""
    # A minimum-norm attack has no radius, and starts where it sees fit.
    names = () if entry.minimum_norm else ("eps", "start") if "start" in entry.accepts else ("eps",)

    def run(
        model: Callable[[Tensor], Tensor],
        inputs: Tensor,
        labels: Tensor,
        eps: float | Tensor,
        start: Tensor,
        **given: Any,  # noqa: ANN401 - mask, targets, levels, init_labels
    ) -> Tensor:
        given |= {key: {"eps": eps, "start": start}[key] for key in names}
        return entry.attack(model=model, inputs=inputs, labels=labels, **{**options, **given})

    return run
