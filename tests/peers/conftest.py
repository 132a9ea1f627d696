"""What the peers attack, and the peers: imported when a test needs them, as that takes long."""

import pytest


@pytest.fixture(scope="session")
def victim():
    from victim import make_victim

    return make_victim()


@pytest.fixture
def peers():
    from benchmarks.attacks.peers import peer_attacks

    return peer_attacks(steps=40, queries=200)
