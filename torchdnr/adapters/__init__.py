"""Adapters that let other libraries attack, and compare with, models that may reject.

Those that need another package are imported when they are first asked for (extra ``peers``):
``AcceptedMisclassification`` (foolbox), ``ARTDetector`` (adversarial-robustness-toolbox),
``RejectionDetector`` and ``SVMDetector`` (pytorch-ood).
"""

from importlib import import_module

from torchdnr.adapters.loops import attack_all_targets, attack_per_label
from torchdnr.adapters.suspicion import suspicion
from torchdnr.adapters.views import as_classifier, for_label, for_target, with_reject

__all__ = [
    "as_classifier",
    "attack_all_targets",
    "attack_per_label",
    "for_label",
    "for_target",
    "suspicion",
    "with_reject",
]

_NEED_PACKAGES = {
    "ARTDetector": "art_detector",
    "AcceptedMisclassification": "foolbox_criterion",
    "RejectionDetector": "pytorch_ood_detectors",
    "SVMDetector": "pytorch_ood_detectors",
}


def __getattr__(name: str) -> object:
    """Import an adapter that needs another package."""
    if name not in _NEED_PACKAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NEED_PACKAGES[name]}"), name)


def __dir__() -> list[str]:
    """List all adapters, those not yet imported too."""
    return sorted([*globals(), *_NEED_PACKAGES])
