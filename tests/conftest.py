"""What every test shares."""

import gc
import os
import signal
from collections import Counter

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; child processes inherit it

import pytest
from hypothesis import settings

settings.register_profile("default", max_examples=25, deadline=None)  # see property_examples.py
settings.register_profile("ci", max_examples=100, deadline=None)
settings.load_profile("default")

FEW_BUT_LONG = {
    *("test_paper", "test_end_to_end", "test_cli_backbone", "test_call_depth", "test_compile"),
    *("test_distributed_fit", "test_checks_models", "test_predict", "test_inference_mode"),
}
"""Modules of few tests that take seconds: begun last, one would keep the other worker waiting."""


def pytest_configure(config):
    """Prepare the processes that run tests; one that hands them out does without PyTorch."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    # A shell's background jobs ignore Ctrl-C, and so would the processes that tests interrupt.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    import accelerator
    import torch

    accelerator.register()
    torch.set_num_threads(1)  # each worker of pytest-xdist, and each child process, has one core
    config.addinivalue_line("filterwarnings", "error::torchdnr.svm.ConvergenceWarning")


def pytest_collection_modifyitems(items):
    """Begin with the modules that take longest, as far as names and numbers of tests tell."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.stem not in FEW_BUT_LONG, -tests[item.path]))


def pytest_collection_finish():
    """Spare the garbage collector the millions of objects that imports have made."""
    gc.collect()
    gc.freeze()


def seed(number):
    """Let random numbers begin anew; PyTorch is imported late, for the process without it."""
    import torch

    torch.manual_seed(number)


def pytest_collectstart(collector):
    """Give what a module draws as it is imported the same numbers whatever came before."""
    if isinstance(collector, pytest.Module):
        seed(2)


def pytest_fixture_setup(fixturedef):
    """Give what fixtures of modules draw the same numbers whatever ran before."""
    if fixturedef.scope != "function":
        seed(1)  # another than that of the tests: what is fitted is not what is held out


@pytest.fixture(autouse=True)
def _seed():
    seed(0)
