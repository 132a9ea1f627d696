"""Pages on the attacks: what they cost and reach, beside secml and beside other libraries."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from benchmarks.common import Page, machine, table

FAR = 2  # percent of a norm above the best known one, from which a sample counts as missed


def attack_page(result: Mapping[str, Any]) -> str:
    """Format cost and strength of our attacks, the contents of attack-cpu.json."""
    overhead, curve = result["overhead"], result["curve"]["found"]
    strength = dict(result["strength"]["found"])
    samples = strength.pop("samples")
    speed = [
        [
            f"`pgd` on {name}, {threads.replace('1 threads', '1 thread')}: time over its own "
            "forward and backward passes alone (quartiles)",
            "{:.2f} ({:.2f} to {:.2f})".format(measured["ratio"], *measured["quartiles"]),
            "<= 1.05",
        ]
        for threads, models in overhead["found"].items()
        for name, measured in models.items()
    ]
    speed += [
        [
            f"curve of {len(curve['eps'])} eps in one batch, rows that evade are done: times "
            f"faster than foolbox {curve['foolbox']}",
            f"{curve['ratio']:.1f}",
            ">= 1.5",
        ],
        ["the same, every row to the end", f"{curve['ratio, all steps']:.1f}", "-"],
    ]
    lines = [
        "`python -m benchmarks.attacks` measures what an attack loop costs beyond the passes "
        f"through the model, and what each attack finds. {machine(overhead['environment'])}; "
        f"{overhead['samples']} test digits of the [default run](mnist-5k.md).",
        "",
        *table(["speed", "reached", "target"], speed),
        "",
        f"Norms and evasions (accepted and wrong, in percent) on the first {samples} digits, l2, "
        "and passes per digit, for attacks at a given eps over all three:",
        "",
        *table(
            ["attack on DNR", "mean norm", "evaded at eps 1", "1.5", "2", "forwards", "backwards"],
            [_strength(*item) for item in strength.items()],
        ),
    ]
    return "\n".join(lines)


def _strength(name: str, measured: Mapping[str, Any]) -> list[str]:
    keys = "forwards_per_sample", "backwards_per_sample"
    if "mean_norm" in measured:
        norm, rates = measured["mean_norm"], measured["evasion"]
        passes = [measured[key] for key in keys]
    else:
        norm, rates = math.inf, {eps: at["evasion"] for eps, at in measured.items()}
        passes = [sum(at[key] for at in measured.values()) for key in keys]
    cells = [f"{100 * rates[eps]:.0f}" for eps in ("1", "1.5", "2")]
    cells += [f"{count:.0f}" for count in passes]
    return [name, f"{norm:.2f}" if math.isfinite(norm) else "-", *cells]


def attack_headline(result: Mapping[str, Any]) -> str:
    """Say what the loop costs beyond its passes, and how much faster a whole curve is."""
    ratios = [
        measured["ratio"]
        for models in result["overhead"]["found"].values()
        for measured in models.values()
    ]
    curve = result["curve"]["found"]
    return (
        f"PGD takes {min(ratios):.2f} to {max(ratios):.2f} times its own passes; a curve of "
        f"{len(curve['eps'])} eps is {curve['ratio']:.1f} times faster than foolbox's"
    )


def secml_page(result: Mapping[str, Any]) -> str:
    """Format the comparison with the library of the paper's authors, secml-cpu.json."""
    compared, fit = result["compare"]["found"], result["fit"]["found"]
    ours, theirs = fit["ours"], fit["secml"]
    lines = [
        "`python -m benchmarks.attacks.secml` puts a trained DNR into secml "
        f"{compared['versions']['secml']}, the library of the paper's authors, and attacks "
        f"{compared['samples']} digits with its attack and with `line_search_pgd`, ours in "
        f"batches. {machine(result['environment'])}; processor time per digit. The lower the mean "
        "objective, the stronger the attack.",
        "",
        *table(["speed", "reached", "target"], _secml_rows(result)),
        "",
        f"secml's attack takes {_secml_seconds(compared)} per digit. Fitting DNR with given "
        f"(C, gamma) to {fit['samples']:,} digits takes {theirs['seconds']:.1f} s and "
        f"{theirs['peak_memory_mib']:,.0f} MiB there, {ours['seconds'][0]:.1f} s and "
        f"{ours['peak_memory_mib']:,.0f} MiB here; the two give the same class to "
        f"{100 * fit['same_class']:.0f} % of {fit['queries']} digits.",
    ]
    return "\n".join(lines)


def _secml_seconds(compared: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{case['secml']['PGDExp']['cpu_seconds_per_sample']:.1f} s at {key}"
        for key, case in compared.items()
        if key.startswith("eps ")
    )


def _secml_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Compare time per sample at options whose mean objective is no higher than secml's."""
    rows = []
    for eps, case, same in _secml_cases(result):
        peer = case["secml"]["PGDExp"]
        objective, spent = peer["mean_objective"]["paper"], peer["cpu_seconds_per_sample"]
        fast = [
            option
            for option in result["options"]["found"]
            if option["eps"] == eps and option["mean_objective"] <= objective
        ]
        best = min(fast, key=lambda option: option["cpu_seconds_per_sample"])
        rows += [
            [
                f"`line_search_pgd`, eps {eps:g}: times faster than secml at 30 steps each (mean "
                f"objective {case['ours']['paper']['mean_objective']['paper']:.3f}, secml "
                f"{objective:.3f})",
                f"{same:.0f}",
                ">= 30",
            ],
            [
                f"the same with {best['steps']} steps, {best.get('doublings', 10)} doublings "
                f"(mean objective {best['mean_objective']:.3f})",
                f"{spent / best['cpu_seconds_per_sample']:.0f}",
                ">= 30",
            ],
        ]
    return rows


def _secml_cases(result: Mapping[str, Any]) -> list[tuple[float, Mapping[str, Any], float]]:
    """List eps, its case, and how much faster our large batch is at the same steps."""
    cases = []
    for key, case in result["compare"]["found"].items():
        if key.startswith("eps "):
            same = case["comparison"]["paper against PGDExp"]
            batch = next(name for name in same if "batch of" in name and not name.endswith(" 1"))
            eps = float(key.removeprefix("eps "))
            cases.append((eps, case, same[batch]["cpu_seconds_per_sample"]))
    return cases


def secml_headline(result: Mapping[str, Any]) -> str:
    """Say how much faster attack and fit are."""
    times = " and ".join(f"{same:.0f}" for _, _, same in _secml_cases(result))
    at = " and ".join(f"{eps:g}" for eps, *_ in _secml_cases(result))
    return (
        f"same classifier, same steps: {times} times faster at eps {at}; DNR fits "
        f"{result['fit']['found']['ratio']:.0f} times faster"
    )


def peers_page(result: Mapping[str, Any]) -> str:
    """Format what attacks of other libraries find that ours do not, peers-cpu.json."""
    run = result["run"]
    eps = [f"{value:g}" for value in run["eps"]]
    lines = [
        "`python -m benchmarks.attacks.peers --robust FILE` lets attacks of foolbox, torchattacks, "
        "ART and AutoAttack look for inputs that our default line-up misses, through "
        f"`torchdnr.adapters`. {machine(result['environment'])}; {run['steps']} steps, "
        f"{run['queries']:,} queries of the square attack. The robust network was trained against "
        "l-infinity perturbations up to 0.3 (CNN-A of alpha-beta-CROWN).",
        "",
        f"Of {run['samples']} digits, those that our worst case does not evade in l2 (only they "
        "were attacked), and how many of them an attack of another library does:",
    ]
    for name, record in result["classifiers"].items():
        left = [str(run["samples"] - sum(record["ours"][size])) for size in eps]
        rows = [
            [peer, *(str(len(entry["table"][size]["peer_only"])) for size in eps)]
            for peer, entry in record["peers"].items()
        ]
        heads = [f"attack on {name}", f"eps {eps[0]}", *eps[1:]]
        lines += ["", *table(heads, [["(not evaded by ours)", *left], *rows])]
    return "\n".join([*lines, "", "`attack.py --restarts N` makes the line-up stronger still."])


def peers_headline(result: Mapping[str, Any]) -> str:
    """Count the samples that only another library's attack evades, by classifier."""
    records = result["classifiers"]
    names = {peer for record in records.values() for peer in record["peers"]}
    counts = ", ".join(f"{name} {len(_missed(record))}" for name, record in records.items())
    return (
        f"{len(names)} attacks of {len({name.split()[0] for name in names})} libraries evade where "
        f"ours does not, of {result['run']['samples']} digits: {counts}"
    )


def _missed(record: Mapping[str, Any]) -> set[int]:
    tables = (entry["table"].values() for entry in record["peers"].values())
    return {sample for rows in tables for row in rows for sample in row["peer_only"]}


def strength_page(result: Mapping[str, Any]) -> str:
    """Format what the default line-up costs and misses, the contents of strength-cpu.json."""
    rows = [
        [
            name,
            digits,
            f"{forwards:,.0f}",
            f"{backwards:,.0f}",
            f"{excess.mean().item():.2f}",
            f"{excess.quantile(0.95).item():.1f}",
            f"{int((excess > FAR).sum())} of {len(excess)}",
            f"{longer:.1f}",
        ]
        for name, digits, forwards, backwards, excess, longer in _excesses(result)
    ]
    settings = result["settings"]
    lines = [
        "`python -m benchmarks.attacks.strength --robust FILE` compares the norms that the default "
        "line-up finds with the best known of each sample: the least over the line-up and much "
        "longer runs of the boundary walk, primal-dual, FMN, and multi-target APGD, APGD and the "
        "line search just below the least norm known. "
        f"{machine(result['environment'])}; l2, {settings['digits']} digits of each kind, of which "
        "those that are wrong without attack do not count. The robust network was trained against "
        "l-infinity perturbations up to 0.3 (CNN-A of alpha-beta-CROWN).",
        "",
        *table(
            [
                "classifier",
                "digits",
                "forwards",
                "backwards",
                "mean excess, %",
                "95th percentile, %",
                f"more than {FAR} % off",
                "longer runs, times the backwards",
            ],
            rows,
        ),
        "",
        "Passes are per digit and include the paper's attack at every eps. Targets: at most 2,000 "
        "forwards and 1,000 backwards, mean excess at most 0.5 %, at most 4 % of the digits more "
        f"than {FAR} % off.",
    ]
    return "\n".join(lines)


def _excesses(
    result: Mapping[str, Any],
) -> Iterator[tuple[str, str, float, float, torch.Tensor, float]]:
    """Yield classifier, digits, passes per digit, excess in percent ``(n,)``, and cost ratio."""
    for name, sets in result["sections"].items():
        for digits, steps in sets.items():
            norms = torch.tensor([list(map(float, step["norms"])) for step in steps.values()])
            ours, best = norms[0], norms.amin(dim=0)
            excess = 100 * (ours[best > 0] / best[best > 0] - 1)
            passes = torch.tensor(
                [
                    torch.tensor(list(step["passes"].values())).sum(dim=0).tolist()
                    for step in steps.values()
                ]
            )
            forwards, backwards = (passes[0] / norms.shape[1]).tolist()
            longer = passes[1:, 1].sum().item() / passes[0, 1].item()
            yield name, digits, forwards, backwards, excess, longer


def strength_headline(result: Mapping[str, Any]) -> str:
    """Give cost and excess over all classifiers and digits."""
    found = list(_excesses(result))
    excess = torch.cat([one[4] for one in found])
    backwards = max(one[3] for one in found)
    return (
        f"at most {backwards:,.0f} backwards per digit; norms {excess.mean().item():.2f} % above "
        f"the best known on average, more than {FAR} % on {int((excess > FAR).sum())} of "
        f"{len(excess)} digits"
    )


PAGES = {
    "strength": Page("What the line-up costs and misses", strength_page, strength_headline),
    "attack": Page("How strong and how fast the attacks are", attack_page, attack_headline),
    "secml": Page("The line search beside secml's", secml_page, secml_headline),
    "peers": Page("Attacks of other libraries", peers_page, peers_headline),
}
