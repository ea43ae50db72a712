"""The messages on an edge: a header of four numbers for each frame, then its bytes."""

from __future__ import annotations

FRAMES_IN_FLIGHT = 3
"""Frames between their first and their last byte, on each side of an edge."""
IDLE = 1.0
"""Seconds without a frame after which the sender sends a keep-alive header."""
KEEP_ALIVE, END = -1, -2
"""Values in place of the piece number in a header: the sender has no frame ready, or has sent the last one."""
ACKNOWLEDGE_TAG = 1
"""Tag of the message by which the receiver confirms that everything has arrived."""


def message_tag(number: int) -> int:
    """Return the tag of the message with this number; each message has its own, so that none is taken for another."""
    return 2 * number
