"""The attacks of an evaluation: never one alone, as each has a weakness that flatters a defence."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from torchdnr.evaluation.known_attacks import ATTACKS, DEFAULT, Attack, choose_attacks
from torchdnr.files import digest


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
    batch_size: int = 256,
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
        batch_size: Inputs per batch.
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
    given = {"init_inputs": init_inputs, "batch_size": batch_size, "progress": progress}
    given |= {"surrogate": surrogate}
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
        run = _nearest(entry.attack, settings, extra)
        if not entry.minimum_norm:
            run = _at_eps(entry.attack, settings, extra, "start" in entry.accepts)
        line_up[entry.label] = Attack(run, entry.minimum_norm, settings, entry.needs, fingerprint)
    return line_up


def _nearest(
    attack: Callable[..., Tensor], settings: Mapping[str, Any], given: Mapping[str, Any]
) -> Callable[..., Tensor]:
    def run(model: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        return attack(model=model, inputs=inputs, labels=labels, **settings, **given)

    return run


def _at_eps(
    attack: Callable[..., Tensor],
    settings: Mapping[str, Any],
    given: Mapping[str, Any],
    goes_on: bool,
) -> Callable[..., Tensor]:
    def run(
        model: Callable[[Tensor], Tensor],
        inputs: Tensor,
        labels: Tensor,
        eps: float,
        start: Tensor,
    ) -> Tensor:
        own = {"start": start} if goes_on else {}
        points = {"model": model, "inputs": inputs, "labels": labels, "eps": eps}
        return attack(**points, **own, **settings, **given)

    return run
