"""What every test shares."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; child processes inherit it

import pytest
from hypothesis import settings

settings.register_profile("default", max_examples=25, deadline=None)  # see property_examples.py
settings.register_profile("ci", max_examples=100, deadline=None)
settings.load_profile("default")


def pytest_configure(config):
    """Prepare the processes that run tests; one that hands them out does without PyTorch."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    import accelerator
    import torch

    accelerator.register()
    torch.set_num_threads(1)  # each worker of pytest-xdist, and each child process, has one core
    config.addinivalue_line("filterwarnings", "error::torchdnr.svm.ConvergenceWarning")


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)
