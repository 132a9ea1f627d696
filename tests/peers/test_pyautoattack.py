import logging

import pytest
import torch

pyautoattack = pytest.importorskip(
    "pyautoattack", reason="needs pyautoattack: pip install -e '.[peers]'"
)

from torchdnr.adapters import attack_per_label, with_reject  # noqa: E402 - after the check above

EPS = 2.0
logging.getLogger("auto-attack").setLevel(logging.ERROR)


def short_attack(view, name):
    """AutoAttack itself, with less patience than its standard version."""
    attack = pyautoattack.AutoAttack(
        view, attacks=[name], version="custom", norm="L2", eps=EPS, seed=0
    )
    attack.apgd.n_restarts = attack.fab.n_restarts = 1
    attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = 10
    attack.apgd_targeted.n_target_classes = 3
    attack.square.n_queries = 100
    return attack


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "square"])
def test_succeeds_where_we_say_so(victim, name):
    rows = torch.arange(8)
    inputs, labels = victim.inputs[rows], victim.labels[rows]
    some = victim._replace(inputs=inputs, labels=labels)

    def run(view, inputs, labels):
        points, predicted = short_attack(view, name).run_standard_evaluation(inputs, labels)
        with torch.no_grad():
            output = victim.model(points)
        own = torch.maximum(output.gather(1, labels[:, None])[:, 0], output[:, -1])
        others = output[:, :-1].scatter(1, labels[:, None], -torch.inf).amax(dim=1)
        assert torch.equal(predicted != labels, others > own)
        return points

    points = attack_per_label(run, victim.model, inputs, labels)
    before, after = some.evading(inputs), some.evading(points)
    assert not (before & ~after).any()
    least = 0 if name == "square" else 2  # a hundred queries decide little
    assert after.sum() >= before.sum() + least
    assert ((points - inputs).flatten(1).norm(dim=1) <= EPS * 1.0001).all()


def test_plain_view_counts_rejected_inputs_as_successes(victim):
    attack = short_attack(with_reject(victim.model), "apgd-ce")
    points, predicted = attack.run_standard_evaluation(victim.inputs, victim.labels)
    wrongly = (predicted != victim.labels) & ~victim.evading(points)
    assert wrongly.any() and victim.rejected(points)[wrongly].all()
