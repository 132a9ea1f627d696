"""Folds: which samples are held out together."""

import torch
from torch import Tensor


def stratified_folds(labels: Tensor, folds: int, seed: int = 0) -> Tensor:
    """Assign the samples of every class evenly to the folds 0..folds-1, in a seeded random order.

    Sizes differ by at most one within a class and, as the remainders are passed on, over all
    samples.
    """
    if folds < 2:
        raise ValueError(f"folds must be >= 2, got {folds}")
    counts = torch.bincount(labels)
    smallest = min(counts[counts > 0].tolist(), default=0)
    if smallest < folds:
        raise ValueError(
            f"every class needs at least as many samples as folds = {folds}, got a class with "
            f"{smallest}: add samples or use fewer folds"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    order = order[labels[order].argsort(stable=True)]
    fold = torch.empty_like(labels)
    fold[order] = torch.arange(len(labels), device=labels.device) % folds
    return fold
