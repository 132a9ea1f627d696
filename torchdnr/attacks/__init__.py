"""Attacks on classifiers that may reject, where success means accepted and wrong.

An attack at a given eps is called as ``attack(model, inputs, labels, eps, **options)``, one that
finds the nearest evading points as ``attack(model, inputs, labels, init_inputs, **options)``. Both
return points like the inputs. The options that attacks share are described in ``FixedEpsOptions``
and ``EvasionOptions``; each attack describes the others. A model is attacked in evaluation mode,
and is in its mode again when the attack returns.
"""

from torchdnr.attacks.apgd import apgd
from torchdnr.attacks.boundary_walk import boundary_walk
from torchdnr.attacks.ddn import ddn
from torchdnr.attacks.ensemble import EnsembleAttack, EnsembleResult
from torchdnr.attacks.fmn import fmn
from torchdnr.attacks.line_search import line_search_pgd
from torchdnr.attacks.lowest_confidence import lowest_confidence
from torchdnr.attacks.multi_target import multi_target
from torchdnr.attacks.noise import noise
from torchdnr.attacks.objectives import OBJECTIVES
from torchdnr.attacks.options import EvasionOptions, FixedEpsOptions, SharedOptions
from torchdnr.attacks.orthogonal import orthogonal_pgd
from torchdnr.attacks.pgd import pgd
from torchdnr.attacks.primal_dual import primal_dual
from torchdnr.attacks.projections import project, project_box, project_l1, project_l2, project_linf
from torchdnr.attacks.smoothing import smoothed_pgd
from torchdnr.attacks.square import square
from torchdnr.attacks.transfer import transfer
from torchdnr.decisions import evades, split_scores, succeeds

__all__ = [
    "OBJECTIVES",
    "EnsembleAttack",
    "EnsembleResult",
    "EvasionOptions",
    "FixedEpsOptions",
    "SharedOptions",
    "apgd",
    "boundary_walk",
    "ddn",
    "evades",
    "fmn",
    "line_search_pgd",
    "lowest_confidence",
    "multi_target",
    "noise",
    "orthogonal_pgd",
    "pgd",
    "primal_dual",
    "project",
    "project_box",
    "project_l1",
    "project_l2",
    "project_linf",
    "smoothed_pgd",
    "split_scores",
    "square",
    "succeeds",
    "transfer",
]
