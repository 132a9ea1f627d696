"""What every test shares."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; child processes inherit it

import accelerator
import pytest
import torch
from hypothesis import settings

accelerator.register()
torch.set_num_threads(1)  # each worker of pytest-xdist, and each child process, keeps to one core
settings.register_profile("default", max_examples=25, deadline=None)  # see property_examples.py
settings.register_profile("ci", max_examples=100, deadline=None)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
