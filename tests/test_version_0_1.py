"""Files and state dicts that version 0.1 wrote still load, and score as they did."""

from pathlib import Path

import pytest
import torch
from torch import nn

from torchdnr import DNR, NR
from torchdnr.files import load_tensors

FOLDER = Path(__file__).parent / "data" / "version-0.1"
CLASSIFIERS = {"DNR": DNR, "NR": NR}
LAYERS = {"conv": ("project", 16), "head": "flatten"}


class SmallNet(nn.Module):
    """A network for images of 6 x 6 pixels and three classes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.conv(x).relu().flatten(1))


@pytest.fixture
def net():
    net = SmallNet()
    net.load_state_dict(load_tensors(FOLDER / "network.safetensors", kind="network")[0])
    return net.eval()


@pytest.fixture(params=CLASSIFIERS)
def kind(request):
    return request.param


def assert_as_before(model, kind):
    before, _ = load_tensors(FOLDER / f"{kind.lower()}-expected.safetensors", kind="expected")
    scores = model.scores(before["images"])
    torch.testing.assert_close(scores, before["scores"], rtol=1e-5, atol=1e-5)
    assert torch.equal(model.threshold, before["threshold"])
    assert torch.equal(model.predict(before["images"]), before["labels"])


def test_a_file_loads_with_scores_threshold_and_selection(net, kind, tmp_path):
    model = CLASSIFIERS[kind].load(FOLDER / f"{kind.lower()}.safetensors", net)
    assert_as_before(model, kind)
    _, metadata = load_tensors(FOLDER / f"{kind.lower()}.safetensors", kind=kind)
    assert model.settings() == {k: v for k, v in metadata.items() if k != "network_digest"}
    assert model.selection == metadata["selection"]
    for name, svm in zip(model.layers, model.base_svms, strict=True):
        assert (svm.C, svm.gamma) == tuple(model.selection[name][key] for key in ("C", "gamma"))
    model.save(tmp_path / "again")
    again = CLASSIFIERS[kind].load(tmp_path / "again", net)
    assert torch.equal(again(torch.ones(1, 1, 6, 6)), model(torch.ones(1, 1, 6, 6)))
    again.save(tmp_path / "once-more")
    assert (tmp_path / "once-more").read_bytes() == (tmp_path / "again").read_bytes()


def test_a_state_dict_loads(kind):
    state, _ = load_tensors(FOLDER / f"{kind.lower()}-state.safetensors", kind="state dict")
    assert {"threshold", "base_svms.0.support_vectors", "features.net.conv.weight"} <= set(state)
    model = DNR(SmallNet(), LAYERS) if kind == "DNR" else NR(SmallNet(), "head")
    model.load_state_dict(state)
    assert_as_before(model.eval(), kind)
    whole = nn.ModuleDict({"inner": DNR(SmallNet(), LAYERS) if kind == "DNR" else model})
    whole.load_state_dict({f"inner.{name}": tensor for name, tensor in state.items()})
    assert_as_before(whole["inner"], kind)
