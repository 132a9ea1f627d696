"""What a check reports, and the report of all of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from textwrap import TextWrapper
from typing import Any, Literal, NamedTuple

from torchdnr.evaluation.metrics import Plain, to_plain

Status = Literal["pass", "warn", "fail", "skipped"]

ORDER: tuple[Status, ...] = ("fail", "warn", "pass", "skipped")
"""Of the checks in a report: what failed is never hidden below."""

_WIDTH = 100  # columns of the text


class Finding(NamedTuple):
    """What a check finds; ``Check`` says what the fields mean."""

    status: Status
    counts: Mapping[str, int | float]
    message: str
    advice: str = ""


@dataclass(frozen=True)
class Check(Plain):
    """The result of one check.

    Attributes:
        name: Name of the check.
        status: "pass"; "warn" where the numbers are doubtful; "fail" where they cannot be trusted;
            "skipped" where the check could not run.
        counts: What was counted or measured.
        message: One sentence on the result, or on why the check was skipped.
        advice: One sentence on what to do; empty where there is nothing to do.
        seconds: Time taken. What more than one check uses is booked at the first.
        forwards: Input rows sent through the model, the surrogate and the parts of a defence.
        backwards: Input rows sent back through them.
    """

    name: str
    status: Status
    counts: Mapping[str, int | float]
    message: str
    advice: str = ""
    seconds: float = 0.0
    forwards: int = 0
    backwards: int = 0


class CannotRun(Exception):
    """Raised by a check that does not apply, with the reason and what it would need."""

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(reason)
        self.advice = advice


@dataclass(frozen=True)
class CheckReport:
    """The results of all checks of one evaluation.

    Attributes:
        checks: One entry per check, in the order in which they ran.
        forwards: Input rows sent through the model, the surrogate and the parts of a defence.
        backwards: Input rows sent back through them.
        seconds: Time taken.
        settings: Options of the checks.
    """

    checks: list[Check]
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> Status:
        """The worst status; a check that broke off with an error counts as "warn"."""
        statuses = {check.status for check in self.checks}
        if broken_off([check.to_dict() for check in self.checks]):
            statuses.add("warn")
        return next((status for status in ORDER if status in statuses), "skipped")

    def names(self, status: Status) -> list[str]:
        """Return the names of the checks with this status."""
        return [check.name for check in self.checks if check.status == status]

    def __getitem__(self, name: str) -> Check:
        """Return the check of this name."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check {name!r}; choose from: {', '.join(c.name for c in self.checks)}")

    def to_dict(self) -> dict[str, Any]:
        """Convert to numbers, lists and dictionaries."""
        return {"status": self.status, **to_plain(self)}

    def __str__(self) -> str:
        """Format the report as plain text: what failed first, with what to do about it."""
        totals = ", ".join(f"{len(self.names(status))} {status}" for status in ORDER)
        lines = [f"checks of the evaluation: {self.status.upper()} ({totals})"]
        width = max((len(check.name) for check in self.checks), default=0)
        indent = " " * (width + 13)
        for status in ORDER:
            for check in (check for check in self.checks if check.status == status):
                head = f"  {status.upper():<7}  {check.name:<{width}}  "
                cost = f" ({check.seconds:.1f} s)" if check.seconds >= 0.05 else ""
                lines += _wrap(check.message + cost, head, indent)
                if check.advice and status != "pass":
                    lines += _wrap(check.advice, f"{indent}-> ", f"{indent}   ")
        lines.append(f"{self.forwards} forwards, {self.backwards} backwards, {self.seconds:.1f} s")
        return "\n".join(lines)


def _wrap(text: str, first: str, others: str) -> list[str]:
    return TextWrapper(_WIDTH, initial_indent=first, subsequent_indent=others).wrap(text)


def broken_off(entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the checks that an error ended: their silence must not pass for success."""
    return [
        entry for entry in entries if entry["status"] == "skipped" and "errors" in entry["counts"]
    ]
