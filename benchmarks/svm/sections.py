"""The four sections as its own process sees them: jobs out, records in."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.svm.certificate import certificate, gram_product, one_vs_rest
from benchmarks.svm.contenders import C_GRID, FOLDS, GAMMA_GRID, OURS
from benchmarks.svm.gradient import COLUMNS, ROUTES
from benchmarks.svm.problems import Problem, Settings
from benchmarks.svm.worker import Say, Worker, describe, measure_interleaved
from torchdnr.kernels import scale_gamma


def measure_fit(
    problem: Problem, C: float, multiple: float, peers: list[str], settings: Settings, say: Say
) -> dict[str, Any]:
    """Measure one (C, gamma) on one data set.

    Args:
        problem: The data.
        C: Upper bound of the dual variables.
        multiple: Gamma as a multiple of "scale".
        peers: Contenders.
        settings: Repeats, budget, device.
        say: Reports progress.

    Returns:
        Sizes, C, gamma, and per contender its times, memory and certificate.
    """
    gamma = multiple * scale_gamma(problem.x_train)
    n, d = problem.x_train.shape
    with TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        problem.save(path)
        common = {"section": "fit", "problem": str(path), "C": C, "gamma": gamma}
        common |= {"device": settings.device, "budget": settings.budget}

        def save(peer: str, worker: Worker, limit: float) -> None:
            worker.ask({"do": "save", "path": f"{folder}/{peer}.npz"}, limit=limit)

        records = measure_interleaved(
            {peer: {**common, "peer": peer} for peer in peers},
            {"do": "fit"},
            repeats=settings.repeats,
            budget=settings.budget,
            say=say,
            finish=save,
        )
        fitted = {p: np.load(f"{folder}/{p}.npz") for p, r in records.items() if "error" not in r}
        found = {p: {name: torch.from_numpy(f[name]) for name in f} for p, f in fitted.items()}
    for peer, values in _certificates(problem, C, gamma, found, settings.device).items():
        records[peer] |= values
    return {"n": n, "d": d, "C": C, "gamma": gamma, "multiple": multiple, "peers": records}


def _certificates(
    problem: Problem,
    C: float,
    gamma: float,
    found: dict[str, dict[str, torch.Tensor]],
    device: str,
) -> dict[str, dict[str, Any]]:
    """Certify all contenders with one pass over the Gram matrix, and score the test samples."""
    if not found:
        return {}
    x = problem.x_train.to(device)
    coefs = [f["coef"].to(device) for f in found.values()]
    sizes = [coef.shape[1] for coef in coefs]
    products = gram_product(x, x, gamma, torch.cat(coefs, 1)).split(sizes, 1)
    scores = gram_product(problem.x_test.to(device), x, gamma, torch.cat(coefs, 1)).split(sizes, 1)
    labels, truth = problem.y_train.to(device), problem.y_test.to(device)
    c, answers = int(labels.max()) + 1, {}
    for index, (peer, values) in enumerate(found.items()):
        intercept, targets = values["intercept"].to(device), one_vs_rest(labels, sizes[index])
        measured = certificate(products[index], targets, coefs[index], intercept, C)
        answers[peer] = {name: value.tolist() for name, value in measured.items()}
        answers[peer]["all_support_vectors"] = int(coefs[index].ne(0).any(dim=1).sum())
        hits = (scores[index] + intercept).argmax(dim=1) == truth
        all_classes = sizes[index] == c
        answers[peer]["test_accuracy"] = hits.double().mean().item() if all_classes else None
    return answers


def all_points() -> list[list[int]]:
    """Return the indices (C, gamma) of all grid points, C by C."""
    return [[i, j] for i in range(len(C_GRID)) for j in range(len(GAMMA_GRID))]


def pilot_points() -> list[list[int]]:
    """Return the corners and the middle of the grid: cheap and costly fits are both among them."""
    last = len(C_GRID) - 1, len(GAMMA_GRID) - 1
    corners = [[i, j] for i in (0, last[0]) for j in (0, last[1])]
    return [*corners, [last[0] // 2, (last[1] + 1) // 2]]


def measure_grid(
    problem: Problem, peers: list[str], settings: Settings, say: Say
) -> dict[str, Any]:
    """Measure the search on one data set: ours in rounds, then each peer once.

    Args:
        problem: The data.
        peers: Contenders.
        settings: Repeats, budget, device, threads.
        say: Reports progress.

    Returns:
        Sizes, grids, and per contender its times and what it found.
    """
    scale = scale_gamma(problem.x_train)
    gammas = [multiple * scale for multiple in GAMMA_GRID]
    n, d = problem.x_train.shape
    records: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        problem.save(path)
        for peer in peers:
            jobs = settings.threads if peer == "sklearn" else 1
            job = {"section": "grid", "peer": peer, "problem": str(path), "gammas": gammas}
            job |= {"jobs": jobs, "device": settings.device}
            if peer == OURS:
                records |= measure_interleaved(
                    {peer: job},
                    {"do": "grid"},
                    repeats=settings.repeats,
                    budget=settings.budget,
                    say=say,
                )
            else:
                records[peer] = {**_within_budget(job, settings.budget, say), "jobs": jobs}
    for record in records.values():
        record |= _choice(record)
    grids = {"C_grid": C_GRID, "gamma_grid": GAMMA_GRID, "folds": FOLDS}
    return {"n": n, "d": d, "scale": scale, **grids, "peers": records}


def _within_budget(job: dict[str, Any], budget: float, say: Say) -> dict[str, Any]:
    """Run as much of a peer's search as its budget allows, and extrapolate the rest.

    A pilot of five fits decides: the whole search, or all points on one fold (folds cost the same),
    or the pilot alone. An extrapolated time is the time in fits and scorings shared out evenly over
    the processes, which is the least that a search can take: it favours the peer.
    """
    limit, everything, pilot = 3 * budget + 600, all_points(), pilot_points()
    worker = Worker(job)
    try:
        answer = worker.ask(limit=limit)
        if "error" not in answer:
            answer, used = worker.ask({"points": pilot, "folds": 1}, limit=limit), (pilot, 1)
            for folds in (FOLDS, 1):
                if "error" in answer:
                    break
                expected = answer["work_seconds"] / len(pilot) / job["jobs"]
                if expected * len(everything) * folds <= budget:
                    used = everything, folds
                    answer = worker.ask({"points": everything, "folds": folds}, limit=limit)
                    break
    finally:
        worker.close()
    if "error" in answer:
        say(f"{job['peer']}: {answer['error']}")
        return {"error": answer["error"]}
    points, folds = used
    if len(points) * folds < len(everything) * FOLDS:
        share = len(points) * folds / (len(everything) * FOLDS)
        note = f"{len(points)} of {len(everything)} grid points, {folds} of {FOLDS} folds"
        answer |= {"extrapolated_from": note, "measured_seconds": answer["seconds"]}
        answer["seconds"] = [answer["work_seconds"] / job["jobs"] / share]
    say(f"{job['peer']}: {describe(answer)}")
    return {**answer, "points": points}


def _choice(record: dict[str, Any]) -> dict[str, Any]:
    """Find the best accuracy, and its C and multiple of "scale"; the first where several are."""
    if "error" in record:
        return {}
    accuracy = record["accuracy"]
    best = max(range(len(accuracy)), key=accuracy.__getitem__)
    i, j = record.get("points", all_points())[best]
    return {"best_accuracy": accuracy[best], "best_C": C_GRID[i], "best_multiple": GAMMA_GRID[j]}


def measure_decisions(
    problem: Problem, trained: Problem | None, peers: list[str], settings: Settings, say: Say
) -> dict[str, Any]:
    """Measure decision values of all test samples.

    Args:
        problem: Its training samples become support vectors, by labels drawn at random.
        trained: What the peers are fitted on instead, with its own labels.
        peers: Contenders.
        settings: Repeats, budget, device.
        say: Reports progress.

    Returns:
        Sizes, and per contender its times; ours with the share of the rate of a matrix product.
    """
    m, (n, d) = len(problem.x_train), problem.x_test.shape
    labels = torch.randint(COLUMNS, (m,), generator=torch.Generator().manual_seed(0))
    labels[:COLUMNS] = torch.arange(COLUMNS)
    with TemporaryDirectory() as folder:
        random = {"problem": f"{folder}/random.npz", "gamma": scale_gamma(problem.x_train), "C": 1}
        Problem(problem.x_train, labels, problem.x_test, problem.y_test).save(random["problem"])
        theirs = random
        if trained is not None:
            gamma = scale_gamma(trained.x_train)
            theirs = {"problem": f"{folder}/trained.npz", "gamma": gamma, "C": 10}
            trained.save(theirs["problem"])
        common = {"section": "decision", "device": settings.device}
        records = measure_interleaved(
            {p: {**common, "peer": p, **(random if p == OURS else theirs)} for p in peers},
            {"do": "decide"},
            repeats=settings.repeats,
            budget=settings.budget,
            say=say,
        )
    ours = records.get(OURS, {})
    if ours.get("seconds"):
        size, columns = ours["support_vectors"], ours["columns"]
        rate = 2 * n * size * (d + columns) / float(np.median(ours["seconds"]))
        ours["gflops"] = rate / 1e9
        ours["product_gflops"] = 2 * n * size * d / ours["product_seconds"] / 1e9
        ours["share_of_product"] = ours["gflops"] / ours["product_gflops"]
    return {"n": n, "d": d, "m": m, "peers": records}


def measure_gradients(
    d: int, batch: int, vectors: int, settings: Settings, say: Say
) -> dict[str, Any]:
    """Measure scores and their input gradient through the routes in torch.

    Args:
        d: Features.
        batch: Inputs, B.
        vectors: Support vectors, S.
        settings: Repeats, budget, device.
        say: Reports progress.

    Returns:
        Sizes, and per route its times, peak memory of tensors and error against float64.
    """
    sizes = {"d": d, "batch": batch, "vectors": vectors}
    common = {"section": "gradient", "device": settings.device, **sizes}
    records = measure_interleaved(
        {route: {**common, "route": route} for route in ROUTES},
        {"do": "gradient"},
        repeats=settings.repeats,
        budget=settings.budget,
        say=say,
    )
    return {**sizes, "columns": COLUMNS, "peers": records}
