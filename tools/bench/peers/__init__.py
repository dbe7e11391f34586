"""The caching libraries' methods that the benchmark compares with, one file per library.

A library is imported when one of its peers is applied, so a missing one costs its peers alone. A
library that does not recognise a model is configured as its documentation asks: which modules to
cache, the current timestep, which half is unconditional.
"""

from __future__ import annotations

from ditfastattn.core.errors import ConfigError
from ditfastattn.tools.bench.peers import cache_dit, diffusers
from ditfastattn.tools.bench.peers.base import Peer

PEERS: tuple[Peer, ...] = (*cache_dit.PEERS, *diffusers.PEERS)


def peers_named(names: str) -> tuple[Peer, ...]:
    """Return the peers in ``names``, separated by commas; or ``all``, or ``none``.

    Raises:
        ConfigError: there is no such peer.
    """
    if names in ("all", "none"):
        return PEERS if names == "all" else ()
    known = {peer.name: peer for peer in PEERS}
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise ConfigError(
                "there is no such peer",
                where="--peers",
                got=name,
                expected=", ".join([*known, "all", "none"]),
            )
    return tuple(known[name] for name in wanted)
