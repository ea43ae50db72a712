"""The progress of one rank, as a value that its heartbeats carry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Progress of a leader. Its heartbeats carry it to rank 0.

    Attributes
    ----------
    phase : str
        The current phase of the rank.
    origin_bytes, peer_bytes : int
        Bytes received in this operation from the origin and from other leaders.
    expected : int
        Bytes to receive, as far as this is known.
    wait_reason : str
        Why the rank waits without receiving bytes, if this is not an error; else empty.
    """

    phase: str = ""
    origin_bytes: int = 0
    peer_bytes: int = 0
    expected: int = 0
    wait_reason: str = ""

    @property
    def done(self) -> int:
        """Bytes received, from the origin and from other leaders."""
        return self.origin_bytes + self.peer_bytes
