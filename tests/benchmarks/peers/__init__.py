"""The peers: the same work, done another way."""

from __future__ import annotations

from tests.benchmarks.peers.higher import Higher
from tests.benchmarks.peers.jax import Jax
from tests.benchmarks.peers.learn2learn import Learn2Learn
from tests.benchmarks.peers.loop import Loop
from tests.benchmarks.peers.peer import Peer
from tests.benchmarks.peers.torchopt import TorchOpt

PEERS: dict[str, Peer] = {
    peer.name: peer for peer in (Loop(), Learn2Learn(), Higher(), TorchOpt(), Jax("vmap"), Jax("map"))
}

__all__ = ["PEERS", "Peer"]
