"""The part of README.md that holds the numbers of the attack benchmarks: written by this file.

`python benchmarks/attack_readme.py` rewrites it from benchmarks/results/attack-cpu.json,
secml-cpu.json and peers-cpu.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.readme_part import rewrite

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
MARKERS = "<!-- attacks: written by benchmarks/attack_readme.py -->", "<!-- end of attacks -->"


def readme_section(
    attack: dict[str, Any], secml: dict[str, Any], peers: dict[str, Any] | None
) -> str:
    """Format cost and strength of the attacks.

    Args:
        attack: Contents of attack-cpu.json.
        secml: Contents of secml-cpu.json.
        peers: Contents of peers-cpu.json, if there are any.

    Returns:
        Markdown: what was run where, the speed targets, and how strong each attack is.
    """
    environment = attack["overhead"]["environment"]
    strength = dict(attack["strength"]["found"])
    samples = strength.pop("samples")
    lines = [
        f"{environment['threads']} threads of an {environment['processor']}, torch "
        f"{environment['torch']}; {attack['overhead']['samples']} test digits of the default run. "
        "secml: processor time per digit, one thread, six digits, ours in batches.",
        "",
        "| speed | reached | target |",
        "|---|---|---|",
    ]
    for threads, models in attack["overhead"]["found"].items():
        for name, found in models.items():
            low, high = found["quartiles"]
            lines.append(
                f"| `pgd` on {name}, {threads.replace('1 threads', '1 thread')}: time over its own "
                f"forward and backward passes alone (quartiles) | {found['ratio']:.2f} "
                f"({low:.2f} to {high:.2f}) | <= 1.05 |"
            )
    curve = attack["curve"]["found"]
    lines.append(
        f"| curve of {len(curve['eps'])} eps in one batch, rows that evade are done: times faster "
        f"than foolbox {curve['foolbox']} | {curve['ratio']:.1f} | >= 1.5 |"
    )
    lines.append(f"| the same, every row to the end | {curve['ratio, all steps']:.1f} | - |")
    lines += _secml_rows(secml)
    lines += [
        "",
        f"Norms and evasions (accepted and wrong, in percent) on the first {samples} digits, l2, "
        "and passes per digit, for attacks at a given eps over all three:",
        "",
        "| attack on DNR | mean norm | evaded at eps 1 | 1.5 | 2 | forwards | backwards |",
        "|---|---|---|---|---|---|---|",
        *(_strength_row(*item) for item in strength.items()),
    ]
    return "\n".join(lines + (_peer_lines(peers) if peers else []))


def _secml_rows(secml: dict[str, Any]) -> list[str]:
    """Compare CPU time per sample at options whose mean objective is no higher than secml's."""
    rows = []
    for key in (key for key in secml["compare"]["found"] if key.startswith("eps ")):
        eps, case = float(key.removeprefix("eps ")), secml["compare"]["found"][key]
        peer = case["secml"]["PGDExp"]
        same = case["comparison"]["paper against PGDExp"]
        batch = next(name for name in same if "batch of" in name and not name.endswith(" 1"))
        objective, spent = peer["mean_objective"]["paper"], peer["cpu_seconds_per_sample"]
        fast = [
            option
            for option in secml["options"]["found"]
            if option["eps"] == eps and option["mean_objective"] <= objective
        ]
        best = min(fast, key=lambda option: option["cpu_seconds_per_sample"])
        rows.append(
            f"| `line_search_pgd`, eps {eps:g}: times faster than secml 0.15.6 at 30 steps each "
            f"(mean objective {case['ours']['paper']['mean_objective']['paper']:.3f}, secml "
            f"{objective:.3f}) | {same[batch]['cpu_seconds_per_sample']:.0f} | >= 30 |"
        )
        rows.append(
            f"| the same with {best['steps']} steps, {best.get('doublings', 10)} doublings (mean "
            f"objective {best['mean_objective']:.3f}) | "
            f"{spent / best['cpu_seconds_per_sample']:.0f} | >= 30 |"
        )
    return rows


def _strength_row(name: str, found: dict[str, Any]) -> str:
    if "mean_norm" in found:
        rates, cost = found["evasion"], found
        norm = f"{found['mean_norm']:.2f}" if found["mean_norm"] != float("inf") else "-"
    else:
        rates = {eps: at["evasion"] for eps, at in found.items()}
        keys = ("forwards_per_sample", "backwards_per_sample")
        cost = {key: sum(at[key] for at in found.values()) for key in keys}
        norm = "-"
    cells = [f"{100 * rates[eps]:.0f}" for eps in ("1", "1.5", "2")]
    passes = [f"{cost[f'{kind}_per_sample']:.0f}" for kind in ("forwards", "backwards")]
    return f"| {name} | {norm} | {' | '.join(cells)} | {' | '.join(passes)} |"


def _peer_lines(peers: dict[str, Any]) -> list[str]:
    """Say how often another library's attack evades where ours does not."""
    run = peers["run"]
    eps = [f"{value:g}" for value in run["eps"]]
    lines = [
        "",
        f"Of {run['samples']} digits, those that an attack of another library evades, through "
        "`torchdnr.adapters`, and our worst case does not"
        + (" (only digits that ours does not evade were attacked):" if run["survivors"] else ":"),
        "",
        f"| attack on DNR, steps: {run['steps']} | eps {' | '.join(eps)} |",
        "|---|" + "---|" * len(eps),
    ]
    for name, entry in peers["peers"].items():
        counts = [str(len(entry["table"][value]["peer_only"])) for value in eps]
        lines.append(f"| {name} | {' | '.join(counts)} |")
    ours = [str(next(iter(peers["peers"].values()))["table"][value]["ours"]) for value in eps]
    return [*lines, f"| (evaded by ours) | {' | '.join(ours)} |"]


def load() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """Read the results, None for peers that have not been measured."""
    paths = [RESULTS / f"{name}-cpu.json" for name in ("attack", "secml", "peers")]
    return tuple(json.loads(path.read_text()) if path.exists() else None for path in paths)


def main() -> int:
    """Rewrite the part of README.md between the markers."""
    return rewrite(MARKERS, readme_section(*load()))


if __name__ == "__main__":
    sys.exit(main())
