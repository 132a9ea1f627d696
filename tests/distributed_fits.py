"""Fits that are made alone, and by two processes when this file is run: `FOLDER [NAME ...]`.

What they take is counted where all are made: counting takes longer than the fits.
"""

import sys
import warnings
from unittest.mock import patch

import torch
from gpytorch.kernels import MaternKernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from torchdnr import DNR, NR
from torchdnr.distributed import alone, current, joined
from torchdnr.distributed.sharing import Partition, ShardedFeatures
from torchdnr.files import save_tensors
from torchdnr.svm import RBFSVM, grid_search, model_selection, out_of_fold_scores, solve_dual
from torchdnr.svm.dual import ACTIVE_SET, certify, dual_bounds
from torchdnr.svm.gram import rbf_rows
from torchdnr.svm.memory_plan import FeaturePlan, MemoryPlan
from torchdnr.svm.multiclass import one_vs_rest
from torchdnr.svm.solver import SolverState, descend

GIVEN = {"conv": (3.0, 0.05), "logits": (10.0, 0.5), "combiner": (1.0, 0.2)}
FINE = 1e-6
"""Tolerance of the fits: what they find then hardly depends on the way there."""


def small_net():
    torch.manual_seed(5)
    layers = {"conv": torch.nn.Conv2d(1, 2, 3), "flat": torch.nn.Flatten()}
    net = torch.nn.Sequential()
    for name, layer in (layers | {"logits": torch.nn.Linear(32, 4)}).items():
        net.add_module(name, layer)
    return net.double()


def images(n, classes, seed=0):
    """Make noise in which a class is a patch of light, and labels."""
    generators = (torch.Generator().manual_seed(s) for s in (9, seed))
    labels = torch.arange(n) % classes
    light, noise = (
        torch.rand(count, 1, 6, 6, generator=generator, dtype=torch.float64)
        for count, generator in zip((classes, n), generators, strict=True)
    )
    return 0.6 * light[labels] + 0.4 * noise, labels


def points(n, classes, d=6, spread=0.8):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(n) % classes
    middle = torch.randn(classes, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return noise + spread * middle[labels], labels


def shared(features):
    partition = Partition.even(len(features), current())
    return ShardedFeatures(features[partition.local].clone(), partition)


def state(model):
    """Return all that was fitted, and the threshold."""
    found = {k: v for k, v in model.state_dict().items() if not k.startswith("features.")}
    for name, chosen in model.selection.items():
        found[f"{name} chosen"] = torch.tensor([chosen["C"], chosen["gamma"]])
        if "accuracy" in chosen:
            found[f"{name} accuracy"] = torch.tensor(chosen["accuracy"])
    return found


def given_hyperparameters(folder):
    options = {"hyperparameters": GIVEN, "stacking_folds": 2, "batch_size": 16}
    model = DNR(small_net(), ["conv", "logits"], **options, tol=FINE)
    model.fit(*images(100, 4)).calibrate(images(75, 4, seed=1)[0], 0.2)
    return state(model)


def searched(folder):
    options = {"C_grid": (0.1, 1.0), "gamma_grid": (1.0,), "folds": 2, "stacking_folds": 2}
    model = DNR(small_net(), ["logits"], **options, tol=FINE)
    model.fit(*images(61, 3)).calibrate(images(41, 3, seed=1)[0], 0.1)
    return state(model)


def two_classes_from_a_loader(folder):
    data = DataLoader(TensorDataset(*images(90, 2)), batch_size=20)
    model = NR(small_net(), "logits", hyperparameters={"logits": (1.0, 0.1)}, tol=FINE)
    return state(model.fit(data).calibrate(DataLoader(images(50, 2, seed=1)[0], batch_size=30)))


def features_in_files(folder):
    model = NR(small_net(), "conv", hyperparameters={"conv": (1.0, 0.1)}, tol=FINE)
    model.fit(*images(60, 3), features_folder=f"{folder}/features")
    again = NR(small_net(), "conv", hyperparameters={"conv": (1.0, 0.1)}, tol=FINE)
    calls = []

    def two_only(_net, inputs):
        calls.append(inputs)
        assert len(calls) <= 2, "the features are in the folder"  # these two try the layers

    hook = again.net.register_forward_pre_hook(two_only)
    again.fit(*images(60, 3), features_folder=f"{folder}/features")
    hook.remove()
    both = {"first": state(model), "again": state(again)}
    return {f"{k} {name}": v for k, found in both.items() for name, v in found.items()}


def rows_that_give_way(folder):
    x, y = points(210, 3)
    held, blocks = MemoryPlan(capacity=80, largest_set=60), FeaturePlan(900, 3600, 7)
    rows = rbf_rows(shared(x), 0.1, x.mean(dim=0), held, blocks)
    return _solution(solve_dual(rows, one_vs_rest(y, 3), 3.0, tol=FINE))


def wide_features_in_little_memory(folder):
    x, y = points(120, 3, d=20_000)
    return _machine(RBFSVM(1.0, "auto", tol=FINE).fit(shared(x), y, memory_limit=30_000_000))


def mostly_at_the_bounds(folder):
    x, y = points(2200, 2, d=4, spread=0.4)
    return _machine(RBFSVM(0.02, 0.1, tol=FINE).fit(shared(x), y))


def mostly_free(folder):
    x, y = points(1010, 3, spread=0.6)
    svm = RBFSVM(10.0, 0.5, tol=FINE).fit(shared(x), y)
    assert set(svm.solution.method) == {ACTIVE_SET}
    return _machine(svm)


def two_variable_updates(folder):
    x, y = points(80, 3)
    rows, targets = rbf_rows(shared(x), 0.1, x.mean(dim=0)), one_vs_rest(y, 3).double()
    lower, upper = dual_bounds(targets, torch.ones_like(targets))
    state = SolverState.start(rows, targets, lower, upper, None, FINE / 2, 1_000_000)
    state.solve = _unsolved
    descend(state)
    found = state.dual_coef.T.contiguous()
    return _solution(certify(rows, targets, lower, upper, found, tol=FINE, steps=state.steps))


def _unsolved(kernels, points, *_):
    count = torch.zeros(len(kernels), dtype=torch.int64)
    return points.dual_coef.clone(), count.bool(), count + 1


def another_kernel_and_weights(folder):
    x, y = points(100, 3)
    svm = RBFSVM(2.0, kernel=MaternKernel(nu=1.5), tol=FINE)
    return _machine(svm.fit(shared(x), y, sample_weight=(torch.arange(100) % 7) / 3.0))


def one_vs_one(folder):
    x, y = points(120, 4)
    return _machine(RBFSVM(1.0, strategy="one-vs-one", tol=FINE).fit(shared(x), y))


def coarse_points():
    """Make classes that overlap so much that the solver stops well before the optimum."""
    return points(400, 3, spread=0.4)


def coarse_tolerance(folder):
    x, y = coarse_points()
    return _machine(RBFSVM(10.0, 0.1, tol=1e-3).fit(shared(x.float()), y))


def search_of_features(folder):
    x, y = points(70, 3)
    search = grid_search(shared(x), y, C_grid=(0.1, 1.0), gamma_grid=(0.5, 2.0), folds=2, tol=FINE)
    held_out = out_of_fold_scores(shared(x), y, C=1.0, gamma=0.1, tol=FINE)
    return {**_machine(search.svm), "held out": held_out, **_table(search)}


def pruned_search(folder):
    """Prune on a part of the samples, whose widths the processes share out."""
    x, y = points(120, 3)
    grid = {"C_grid": (1.0, 2.0), "gamma_grid": (0.5, 1.0, 1e4, 2e4), "folds": 2}
    with patch.object(model_selection, "PART", 60):
        search = grid_search(shared(x), y, tol=FINE, **grid, pruning=True)
    return {**_machine(search.svm), "pruned": search.pruned, **_table(search)}


def refined_search(folder):
    """Refine from one point: the first process does that for all."""
    x, y = points(70, 3, spread=0.4)
    grid = {"C_grid": (10.0,), "gamma_grid": (0.3,), "folds": 2, "refine": "ard"}
    search = grid_search(shared(x), y, tol=FINE, **grid)
    refined = search.refinement
    found = torch.tensor([*refined.C[1], *refined.gamma, *refined.scale])
    return {**_machine(search.svm), "refinement": found}


def _table(search):
    return {"accuracy": search.accuracy, "method": torch.stack([*search.method.values()])}


def _machine(svm):
    whole = torch.zeros(svm.solution.samples, len(svm.intercept), dtype=torch.float64)
    whole = whole.index_copy(0, svm.support, svm.dual_coef.double())
    certificate = _solution(svm.solution, CERTIFICATE)
    return {**svm.state_dict(), "solution dual_coef": whole, **certificate}


CERTIFICATE = "objective", "duality_gap", "converged"


def _solution(solution, names=("dual_coef", "intercept", "scores", *CERTIFICATE)):
    return {f"solution {name}": getattr(solution, name) for name in names}


FITS = {
    fit.__name__: fit
    for fit in (
        given_hyperparameters,
        searched,
        two_classes_from_a_loader,
        features_in_files,
        rows_that_give_way,
        wide_features_in_little_memory,
        mostly_at_the_bounds,
        mostly_free,
        two_variable_updates,
        another_kernel_and_weights,
        one_vs_one,
        search_of_features,
        pruned_search,
        refined_search,
        coarse_tolerance,
    )
}
COARSE, REFINED = coarse_tolerance.__name__, refined_search.__name__


class Counted(TorchDispatchMode):
    """Count the exponentials of kernel values, factorisations and the multiplications in these."""

    def __init__(self):
        super().__init__()
        self.work = {"kernel values": 0, "blocks": 0, "factorisations": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("exp", "exp_"):
            self.work["kernel values"] += args[0].numel()
        elif name == "linalg_cholesky_ex":
            self.work["factorisations"] += args[0].shape[0]
            self.work["blocks"] += args[0].numel() * args[0].shape[-1]
        return func(*args, **(kwargs or {}))


def make(name, folder):
    """Make a fit, and count what it took."""
    with Counted() as counted:
        found = FITS[name](folder)
    return found | {f"work {what}": torch.tensor(count) for what, count in counted.work.items()}


def refused(processes):
    """Give processes images that do not fit together; return what they say."""
    net, (x, y) = small_net(), images(60, 3)
    model = NR(net, "conv", hyperparameters={"conv": (1.0, 0.1)})
    other = NR(small_net(), "conv", hyperparameters={"conv": (1.0, 0.1)})
    other.net.conv.bias.data += processes.rank
    own = slice(30 * processes.rank, 30 * processes.rank + 30)
    shuffled = y.roll(processes.rank)
    cases = {
        "shuffled": lambda: model.fit(x, shuffled),
        "sampled by process": lambda: model.fit(x[own], y[own]),
        "no length": lambda: model.fit(iter([(x, y)])),
        "one batch": lambda: model.fit([(x, y)]),
        "another network": lambda: other.fit(x, y),
    }
    said = {}
    for name, case in cases.items():
        try:
            case()
        except ValueError as error:
            said[name] = str(error)
    with alone():  # what is refused above
        model.fit(x, shuffled).calibrate(x[own])
        other.fit(x, y)
        inside = current().count
    return said | {"alone": f"{inside} process instead of {current().count}"}


def main(folder, *names):
    """Make fits, by default all of them, together with the other process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as processes:
        for name in names or FITS:
            found = FITS[name](folder) if names else make(name, folder)
            save_tensors(f"{folder}/{name}-{processes.rank}", found, {}, "fit")
        save_tensors(f"{folder}/refused-{processes.rank}", {}, refused(processes), "refused")


if __name__ == "__main__":
    main(*sys.argv[1:])
