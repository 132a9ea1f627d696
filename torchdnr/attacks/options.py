"""The options that attacks share: declared, documented, and given their defaults here alone.

An attack takes its own options by name and the shared ones as ``**shared``, which it hands on as a
whole. Editors complete them, type checkers check them, and a wrong name is refused at run time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any, TypedDict, get_args

from torch import Tensor
from tqdm import tqdm

from torchdnr.resources import progress_bar


class SharedOptions(TypedDict, total=False):
    """Options of every attack.

    Attributes:
        norm: Norm of the perturbation: 1, 2 (default) or infinity.
        bounds: Smallest and largest value of an input; default (0, 1).
        batch_size: Rows in one forward, and inputs attacked at a time; None (default): 256, fewer
            of large ones (``resources.default_batch_size``).
        reject: Whether the last column of the output is the threshold; None (default) asks whether
            ``model.reject_index`` is set.
        seed: Of the random numbers; default 0.
        mask: What of each input may change, bool or 0 and 1, of the shape of one input or of all;
            singleton dimensions broadcast, as ``(1, H, W)`` to all channels. Elsewhere a point
            equals its input exactly. None (default): everything.
        progress: Whether to show a progress bar; default False.
    """

    norm: float
    bounds: tuple[float, float]
    batch_size: int | None
    reject: bool | None
    seed: int
    mask: Tensor | None
    progress: bool


class EvasionOptions(SharedOptions, total=False):
    """Options of every attack that wants to be accepted and wrong.

    Attributes:
        targets: Class wanted for each input, int64 ``(n,)``, none of them the true one; or one
            class for all, a number: inputs of that class are returned as they are. None (default):
            any but the true one.
        levels: Levels that a pixel can have, 256 for images of 8 bits: points lie on them, and so
            evade, if they do, as an image file too. The inputs must lie on levels. Default None.
        restarts: Further runs from other starting points, default 0: at a given eps from random
            points of the ball, for the inputs that do not evade yet; of a minimum-norm attack from
            random points no farther than the nearest evading one, where the attack can start
            there, and from samples of another random part of ``init_inputs``.
        init_labels: Class that the model assigns to each sample of ``init_inputs``, -1 where it
            rejects, int64 ``(m,)``; saves one forward over them. Their true classes serve as well.
    """

    targets: int | Tensor | None
    levels: int | None
    restarts: int
    init_labels: Tensor | None


class FixedEpsOptions(EvasionOptions, total=False):
    """Options of every attack at a given eps.

    Attributes:
        start: Where to start, ``(n, ...)``, for instance the result at a smaller eps; projected,
            and used where it is better than the input itself. None (default): at the inputs.
        init_inputs: Samples of any class, ``(m, ...)``: the best one that is accepted as another
            class starts a second run of the inputs that do not evade. RBF scores are flat far from
            the training data, so a descent from the input alone stalls and flatters the defence.
    """

    start: Tensor | None
    init_inputs: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """The shared options of one call, with their defaults; see the classes above."""

    norm: float = 2
    bounds: tuple[float, float] = (0.0, 1.0)
    batch_size: int | None = None
    reject: bool | None = None
    seed: int = 0
    mask: Tensor | None = None
    progress: bool = False
    targets: int | Tensor | None = None
    levels: int | None = None
    restarts: int = 0
    init_labels: Tensor | None = None
    start: Tensor | None = None
    init_inputs: Tensor | None = None

    def bar(self, steps: int, name: str) -> tqdm:
        """Begin the progress bar of a run."""
        return progress_bar(self.progress, total=steps, desc=name, leave=False)


DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Options)}
"""Defaults of the shared options."""


def options_of(attack: Callable[..., object]) -> dict[str, Any]:
    """List the options of an attack with their defaults, those of its own and the shared ones."""
    options: dict[str, Any] = {}
    for name, parameter in signature(attack).parameters.items():
        if parameter.kind is Parameter.VAR_KEYWORD:
            for shared in get_args(parameter.annotation):
                options |= {key: DEFAULTS[key] for key in shared.__annotations__}
        elif parameter.default is not Parameter.empty:
            options[name] = parameter.default
    return options


def resolve(
    attack: Callable[..., object],
    given: Mapping[str, Any],
    **named: Any,  # noqa: ANN401 - shared options that the attack names in its signature
) -> Options:
    """Add the defaults to the shared options that an attack was given, and refuse unknown names.

    ``named`` are shared options that have a place of their own in the signature of the attack. A
    wrong name is a TypeError that lists close ones.
    """
    known = options_of(attack)
    for name in given:
        if name not in known:
            close = ", ".join(map(repr, get_close_matches(name, known, cutoff=0.5)))
            advice = f"did you mean {close}?" if close else f"it has: {', '.join(known)}"
            raise TypeError(f"{attack.__name__} has no option {name!r}; {advice}")
    return Options(**given, **named)


def only_shared(options: Mapping[str, Any]) -> Options:
    """Resolve the shared options among those that an attack passes on to another one."""
    return Options(**{name: value for name, value in options.items() if name in DEFAULTS})
