"""A reader gets from what is called to the mathematics in a few steps."""

import call_depth
import pytest


def test_a_forward_pass():
    calls = call_depth.forward_pass()
    assert 0 < len(calls) <= 6 and len({file for file, _ in calls}) <= 4, calls


def test_a_fit():
    assert 0 < len(call_depth.fit()) <= 8


@pytest.mark.slow
def test_an_attack_of_the_command_line():
    assert 0 < len(call_depth.attack()) <= 10
