"""Automatic checks that tell whether an evaluation can be trusted."""

from torchdnr.evaluation.checks.result import Check, CheckReport
from torchdnr.evaluation.checks.run import CHECKS, run_checks

__all__ = ["CHECKS", "Check", "CheckReport", "run_checks"]
