"""Unit directions of gradients of any size."""

import math

import pytest
import torch
from accelerator import accelerator, on_accelerator

from torchdnr.attacks import directions


@pytest.fixture(params=["cpu", "accelerator"])
def unit(request):
    """The function on a CPU, and on a device where a look at a value makes the host wait."""
    if request.param == "cpu":
        yield directions.unit
    else:
        with accelerator():
            yield on_accelerator(directions.unit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unit_of_any_size_is_that_of_exact_arithmetic(dtype, unit):
    torch.manual_seed(0)
    rows = torch.randn(6, 2, 3, dtype=dtype)
    rows *= torch.tensor([1.0, 1e-30, 1e30, 1e-12, 1e12, 1e-40], dtype=dtype)[:, None, None]
    scaled, length = unit(rows)
    exact = rows.double() * 2.0**100  # no square vanishes
    norms = exact.flatten(1).norm(dim=1)
    expected = exact / norms[:, None, None]
    tolerance = 1e-4 if dtype == torch.float32 else 1e-14  # the last row has few bits left
    torch.testing.assert_close(scaled.double(), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(length.double(), norms / 2.0**100, atol=0, rtol=1e-4)


def test_zero_nan_and_infinite_rows_do_no_harm_to_themselves_or_others(unit):
    usual = torch.tensor([3.0, 4.0, 0.0])
    odd = torch.tensor([[0.0, 0.0, 0.0], [math.nan] * 3, [math.inf, 0.0, -1.0], [math.nan, 2, 0.0]])
    scaled, length = unit(torch.cat([usual[None], odd]))
    expected = torch.tensor([[0.6, 0.8, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]])
    torch.testing.assert_close(scaled, expected)
    assert length[:3].tolist() == [5, 0, 0]
    assert torch.equal(scaled[0], unit(usual[None])[0][0])
