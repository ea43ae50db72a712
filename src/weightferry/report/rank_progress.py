"""How far one rank is, as a value that travels with its signs of life."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a rank is that brings bytes for others; travels with its signs of life.

    Attributes
    ----------
    phase : str
        The round that it works in.
    origin_bytes, peer_bytes : int
        What has come in this operation.
    expected : int
        What is to come, as far as it is known.
    paused : str
        Why bytes stand still, when there is a reason that is no trouble; else empty.
    """

    phase: str = ""
    origin_bytes: int = 0
    peer_bytes: int = 0
    expected: int = 0
    wait_reason: str = ""

    @property
    def done(self) -> int:
        """Bytes that have come."""
        return self.origin_bytes + self.peer_bytes
