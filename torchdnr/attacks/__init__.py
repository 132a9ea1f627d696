"""Attacks on classifiers that may reject, where success means accepted and wrong."""

from torchdnr.attacks.boundary_walk import boundary_walk
from torchdnr.attacks.line_search import line_search_pgd
from torchdnr.attacks.objectives import OBJECTIVES, evades, split_scores
from torchdnr.attacks.projections import project, project_box, project_l2

__all__ = [
    "OBJECTIVES",
    "boundary_walk",
    "evades",
    "line_search_pgd",
    "project",
    "project_box",
    "project_l2",
    "split_scores",
]
