"""The line-up as a cascade, on shares of the samples: nearest points first, the rest below them."""

import math

import pytest
import torch
from small_models import make_images, small_dnr

from torchdnr.attacks.projections import project
from torchdnr.decisions import REJECT
from torchdnr.evaluation import (
    BOUNDARY_WALK,
    LINE_SEARCH_PGD,
    Attack,
    SecurityCurve,
    build_line_up,
    estimate,
    security_evaluation,
    security_evaluations,
)
from torchdnr.evaluation.shares import split_into_shares

LEFT = torch.tensor([1.0, 0.0])


def halves(x):
    """Two classes told apart at x_0 = 0.5, and nothing rejected but the line between them."""
    side = x[:, :1] - 0.5
    return torch.cat([-side, side, torch.zeros_like(side)], dim=1)


halves.reject_index = 2


def far(model, inputs, labels, eps, start):
    """Go 0.2 beyond the border, a minimum-norm attack that is not good at it."""
    points = inputs.clone()
    points[:, 0] = 0.3 + 0.4 * (1 - labels)
    return points


class Move:
    """Go straight across the border as far as eps lets it; remember what it was given."""

    def __init__(self, reach=1.0):
        self.reach = reach  # share of eps that it goes
        self.calls = []

    def __call__(self, model, inputs, labels, eps, start):
        self.calls.append((inputs, eps, start))
        model(inputs)
        radius = torch.as_tensor(eps).expand(len(inputs))[:, None] * self.reach
        return project(inputs + radius * LEFT * (1 - 2 * labels[:, None]), inputs, 9.0, 2, (0, 1))


@pytest.fixture
def data():
    inputs = torch.rand(13, 2)
    inputs[:, 0] = torch.linspace(0.02, 0.98, 13)
    inputs[6, 0] = 0.51
    labels = (inputs[:, 0] > 0.5).long()
    labels[2] = 1 - labels[2]  # wrong without any attack
    return inputs, labels


def evaluate(data, attacks, eps=(0, 0.1, 0.3), **options):
    return security_evaluation(halves, *data, eps, attacks=attacks, progress=False, **options)


def test_an_attack_is_tried_below_each_norm_and_lower_while_it_succeeds(data):
    inputs, _ = data
    move = Move()
    line_up = {"move": Attack(move, every_eps=False), "far": Attack(far, minimum_norm=True)}
    curve = evaluate(data, line_up, (0, 0.3))
    right = torch.arange(13) != 2
    distance = (inputs[:, 0] - 0.5).abs()
    norms = (distance + 0.2)[right]  # what the first attack has found
    for number, (attacked, eps, start) in enumerate(move.calls):
        expected = (norms * (1 - 0.01 * 2 ** min(number, 3))).clamp_max(0.3)
        assert torch.equal(attacked, inputs[right]) and torch.allclose(eps, expected)
        assert torch.equal(start, attacked)
        succeeds = eps > distance[right] * (1 + 1e-5)
        norms, right = eps[succeeds], right.clone().masked_scatter(right, succeeds)
    assert 3 < number < 16
    added = curve.refinements["move"]
    assert list(curve.attacks) == ["far"] and list(curve.refinements) == ["move"]
    assert added.tried == 12 and added.nearer == len(move.calls[1][0])
    assert added.forwards == sum(len(attacked) for attacked, *_ in move.calls)
    assert curve.evasion_norm[2] == 0
    assert torch.allclose(curve.evasion_norm[right].float(), norms, rtol=1e-4)


def nowhere(model, inputs, labels, eps, start):
    """Find nothing, as a minimum-norm attack without a start."""
    return inputs


@pytest.mark.parametrize("weak", [nowhere, far])
def test_a_weak_minimum_norm_attack_hides_nothing_that_the_others_find(data, weak):
    eps = [0, 0.02, 0.05, 0.1, 0.2, 0.6]
    line_up = {"weak": Attack(weak, minimum_norm=True), "move": Attack(Move(), every_eps=False)}
    cascade, full = (evaluate(data, line_up, eps, every_eps=every) for every in (False, True))
    assert cascade.accuracy == full.accuracy
    assert (cascade.evasion_norm <= full.evasion_norm * (1 + 1e-6)).all()


def test_an_attack_goes_on_as_long_as_it_comes_nearer():
    def farther(model, inputs, labels, eps, start):
        return inputs + LEFT * 0.79 * (1 - 2 * labels[:, None])

    data = torch.tensor([[0.21, 0.5], [0.2, 0.5]]), torch.tensor([0, 0])
    line_up = {
        "farther": Attack(farther, minimum_norm=True),
        "move": Attack(Move(), every_eps=False),
    }
    curve = evaluate(data, line_up, (0, 1))
    assert (curve.evasion_norm < torch.tensor([0.32, 0.33])).all()


def test_the_nearest_points_of_all_attacks_count_at_every_eps(data):
    inputs, labels = data
    line_up = {"far": Attack(far, minimum_norm=True), "move": Attack(Move(), every_eps=False)}
    curve = evaluate(data, line_up)
    alone = evaluate(data, {"far": line_up["far"]})
    assert (curve.evasion_norm <= alone.evasion_norm).all()
    evading = (curve.predictions != REJECT) & (curve.predictions != labels)
    for row, eps in zip(evading[1:], (0.1, 0.3), strict=True):
        assert torch.equal(row, curve.evasion_norm <= eps * (1 + 1e-6))
    assert evading[2].sum() > evading[1].sum() > 1
    assert torch.equal(evading.cummax(dim=0).values, evading)
    size = (curve.nearest - inputs).double().norm(dim=1)
    assert torch.allclose(size[curve.evasion_norm.isfinite()], curve.evasion_norm)


@pytest.mark.parametrize("why", ["asked for", "no minimum-norm attack", "its own"])
def test_attacks_run_at_every_eps_where_that_is_wanted_or_needed(data, why):
    move = Move()
    line_up = {"move": Attack(move, every_eps=why == "its own")}
    if why != "no minimum-norm attack":
        line_up["far"] = Attack(far, minimum_norm=True)
    curve = evaluate(data, line_up, every_eps=why == "asked for")
    assert [eps for _, eps, _ in move.calls] == [0.1, 0.3]
    assert not curve.refinements and list(curve.attacks) == list(line_up)


def test_what_leaves_its_own_ball_is_projected_back_and_counted(data):
    cheat = Attack(Move(reach=1.5), every_eps=False)
    line_up = {"far": Attack(far, minimum_norm=True), "cheat": cheat}
    with pytest.warns(UserWarning, match=r"cheat below the norms found: \d+ of \d+ points left"):
        curve = evaluate(data, line_up)
    assert curve.refinements["cheat"].violations >= 12
    assert (curve.adversarial[1] - data[0]).norm(dim=1).max() <= 0.1 * (1 + 1e-6)


def test_refinements_survive_json_and_files_without_them_load(data, tmp_path):
    line_up = {"far": Attack(far, minimum_norm=True), "move": Attack(Move(), every_eps=False)}
    curve = evaluate(data, line_up)
    curve.save(tmp_path / "curve.json")
    assert SecurityCurve.load(tmp_path / "curve.json").refinements == curve.refinements
    content = curve.to_dict()
    del content["refinements"]
    assert SecurityCurve.from_dict(content).refinements == {}


# --- a toy DNR ---


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    images = make_images(60)
    model = small_dnr(images)
    return model, images[:21], model.scores(images[:21]).argmax(dim=1), images


QUICK = {
    "boundary-walk": {"steps": 20, "restarts": 0, "starts": 4, "neighbours": 10},
    "apgd": {"steps": 20},
    "line-search-pgd": {"steps": 4},
}


def test_the_cascade_finds_what_all_attacks_at_every_eps_find(toy):
    model, inputs, labels, pool = toy
    attacks = build_line_up(["default"], pool, own_options=QUICK)
    eps = [0, 0.7, 1.1]
    inputs, labels = inputs[:12], labels[:12]
    both = [
        security_evaluation(
            model, inputs, labels, eps, attacks=attacks, progress=False, every_eps=every_eps
        )
        for every_eps in (False, True)
    ]
    cascade, full = both
    assert list(full.attacks) == list(attacks) and list(cascade.refinements) == ["APGD"]
    assert 0.2 < full.accuracy[1] < 1
    assert (cascade.evasion_norm <= 1.01 * full.evasion_norm).all()
    assert all(one <= two for one, two in zip(cascade.accuracy, full.accuracy, strict=True))
    for name in (LINE_SEARCH_PGD, BOUNDARY_WALK):
        alone, other = cascade.attacks[name], full.attacks[name]
        assert torch.equal(alone.predictions, other.predictions)
        assert (alone.forwards, alone.backwards) == (other.forwards, other.backwards)
    assert cascade.refinements["APGD"].forwards < sum(full.attacks["APGD"].forwards)


def test_the_pool_is_labelled_once_for_each_classifier(toy):
    model, inputs, labels, pool = toy
    mark = torch.zeros_like(pool[:1])  # is rejected: no attack starts there
    pool = torch.cat([pool, mark])
    seen = []

    class Watched(torch.nn.Module):
        reject_index = 3

        def forward(self, x):
            seen.append(int((x == mark).flatten(1).all(dim=1).sum()))
            output = model(x)
            output[:, 3] += 100.0 * (x == mark).flatten(1).all(dim=1)
            return output

    own = QUICK | {"apgd": {"steps": 3}, "apgd-multi-target": {"steps": 3}}
    attacks = build_line_up(["default", "apgd-multi-target"], pool, own_options=own)
    models = {"one": Watched(), "two": Watched()}
    security_evaluations(models, inputs, labels, [0.9], attacks=attacks, progress=False)
    assert sum(seen) == 2
    seen.clear()
    security_evaluations(models, inputs, labels, [0], attacks=attacks, progress=False)
    assert sum(seen) == 0


def test_the_passes_of_each_attack_are_known_roughly_beforehand(toy, monkeypatch):
    seconds = estimate.PassSeconds(0.01, 0.02)  # on a fast machine it takes no time worth saying
    monkeypatch.setattr(estimate, "_measure_passes", lambda task: seconds)
    model, inputs, labels, pool = toy
    inputs, labels = inputs[:6], labels[:6]
    names = ["default", "pgd", "fmn", "selective-pgd", "smoothed-pgd", "square", "noise"]
    own = {name: {"steps": 6} for name in ("apgd", "fmn", "selective-pgd", "smoothed-pgd")}
    own |= {"boundary-walk": {"starts": 6, "restarts": 1}, "pgd": {"restarts": 1, "steps": 6}}
    own |= {"square": {"queries": 40}}
    attacks = build_line_up(names, pool, own_options=own)
    eps = [0.2, 0.4, 0.6, 0.8]
    said = []
    curve = security_evaluation(
        model, inputs, labels, eps, attacks=attacks, progress=False, say=said.append
    )
    assert len(said) == 1 and said[0].startswith("the attacks take about ")
    for name, attack in attacks.items():
        if name in curve.refinements:
            added = curve.refinements[name]
            counted = (added.forwards + added.backwards) / added.tried
        else:
            runs = sum(curve.attacks[name].forwards), sum(curve.attacks[name].backwards)
            counted = sum(runs) / 6 / (1 if attack.minimum_norm else 0.6 * len(eps))
        assert 0.5 < counted / sum(attack.passes) < 2, name


@pytest.mark.parametrize("masked", [False, True])
def test_attacks_below_the_norms_start_in_the_pool_where_there_is_a_mask(data, masked):
    inputs, _ = data
    given = []

    def pooled(model, inputs, labels, eps, start, **more):
        given.append(more)
        return start

    line_up = {
        "far": Attack(lambda *arguments, **more: far(*arguments), minimum_norm=True),
        "pooled": Attack(pooled, every_eps=False, pool=inputs),
    }
    mask = torch.tensor([True, False]) if masked else None
    evaluate(data, line_up, mask=mask)
    for more in given:
        assert ("init_labels" in more) == masked
        assert ("init_inputs" in more) != masked


# --- shares ---


@pytest.mark.parametrize("n", [1, 4, 19, 20, 50, 100, 999, 1025, 10_000])
def test_shares_hold_every_sample_once_and_are_of_one_size(n):
    shares = split_into_shares(n)
    assert torch.equal(torch.cat(shares), torch.arange(n))
    sizes = [len(rows) for rows in shares]
    assert max(sizes) <= 256 and max(sizes) - min(sizes) <= 1
    assert len(shares) == 1 or min(sizes) >= 10
    assert len(shares) >= min(n / 64, 4)  # of each classifier: enough for several processes
    assert n < 20 or len(shares) > 1


def test_a_stopped_share_goes_on_and_the_others_are_not_run_again(tmp_path):
    inputs = torch.rand(25, 2)
    data = inputs, (inputs[:, 0] > 0.5).long()
    move = Move()

    def failing(*arguments):
        if len(move.calls) == 3:
            move.calls.append(None)
            raise KeyboardInterrupt
        return move(*arguments)

    line_up = {"far": Attack(far, minimum_norm=True), "move": Attack(failing)}
    path = tmp_path / "steps.safetensors"
    with pytest.raises(KeyboardInterrupt):
        evaluate(data, line_up, checkpoint=path)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"steps-{k}-of-2.safetensors" for k in (1, 2)]
    first = files[0].read_bytes()
    resumed = evaluate(data, line_up, checkpoint=path)
    sizes = [call and (len(call[0]), call[1]) for call in move.calls]
    assert sizes[0] == (13, 0.1) and sizes[2] == (12, 0.1) and sizes[3] is None
    assert [eps for _, eps in sizes[4:]] == [0.3] and sizes[4][0] <= 12
    whole = evaluate(data, {"far": line_up["far"], "move": Attack(Move())})
    assert torch.equal(resumed.adversarial, whole.adversarial)
    assert torch.equal(resumed.evasion_norm, whole.evasion_norm)
    assert resumed.attacks["move"].forwards == whole.attacks["move"].forwards
    assert files[0].read_bytes() == first


def test_only_what_depends_on_a_change_is_run_again(data, tmp_path):
    calls = []

    def line_up(**settings):
        def told(name, attack):
            def run(*arguments):
                calls.append((name, arguments[3]))
                return attack(*arguments)

            return run

        return {
            "far": Attack(told("far", far), minimum_norm=True, settings=settings),
            "column": Attack(told("column", Move())),
            "move": Attack(told("move", Move()), every_eps=False),
        }

    def names(**options):
        calls.clear()
        evaluate(data, checkpoint=tmp_path / "steps", **options)
        return [name if name == "move" else (name, eps) for name, eps in calls]

    columns = [("column", 0.1), ("column", 0.3)]
    assert names(attacks=line_up())[:3] == [("far", math.inf), *columns]
    assert names(attacks=line_up()) == []
    larger = names(attacks=line_up(), eps=(0, 0.1, 0.3, 0.4))
    assert larger[0] == ("column", 0.4) and set(larger[1:]) == {"move"}
    assert names(attacks=line_up(), eps=(0, 0.2))[0] == ("column", 0.2)
    changed = names(attacks=line_up(steps=3))
    assert changed[0] == ("far", math.inf) and set(changed[1:]) == {"move"}
    assert names(attacks=line_up()) == []
    assert names(attacks={"move": line_up()["move"], **line_up()}) == []


def three(x):
    """Two classes told apart at x_0 = 0.5, and a third that is far behind."""
    side = x[:, :1] - 0.5
    return torch.cat([-side, side, torch.full_like(side, -1.0)], dim=1)


def at_the_border(model, inputs, labels, eps, start):
    """Go beyond the border by as little as a number can, where that is within eps."""
    points = inputs.clone()
    points[:, 0] = torch.nextafter(torch.tensor(0.5), 1.0 - labels)
    near = (points - inputs).norm(dim=1) <= eps
    return torch.where(near[:, None], points, inputs)


def test_what_evades_by_rounding_alone_is_no_nearer_evasion(data):
    inputs, labels = data
    border = Attack(at_the_border, every_eps=False)
    line_up = {"far": Attack(far, minimum_norm=True), "border": border}
    curve = security_evaluation(three, *data, [1.0], attacks=line_up, progress=False)
    found = (far(three, inputs, labels, None, None) - inputs).norm(dim=1)
    right = torch.arange(13) != 2
    torch.testing.assert_close(curve.evasion_norm, torch.where(right, found, 0).double())
