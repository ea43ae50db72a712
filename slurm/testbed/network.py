"""The network of a testbed: one bridge, and a veth pair from it to each host.

The bridge is in the supervisor's network namespace and each host has its own, so the machine's own interfaces are never
touched, every testbed can use the same names and addresses, and all of it goes when its processes go.
"""

from __future__ import annotations

from .spec import PREFIX_LENGTH, Host, Spec
from .tools import tool

_BRIDGE = "br0"
INTERFACE = "eth0"
"""The interface of every host."""


def port(host: Host) -> str:
    """Return the name of the bridge's end of the pair that leads to `host`."""
    return f"to-{host.name}"


def build_switch(spec: Spec, pids: dict[str, int]) -> None:
    """Make the bridge and plug every host in.

    Parameters
    ----------
    spec
        The testbed.
    pids
        By host, a process in its network namespace, as this process numbers it.
    """
    lines = [f"link add {_BRIDGE} type bridge stp_state 0 forward_delay 0", f"link set {_BRIDGE} up"]
    for host in spec.hosts:
        lines.append(f"link add {port(host)} type veth peer name {INTERFACE} netns {pids[host.name]}")
        lines.append(f"link set {port(host)} master {_BRIDGE} up")
    tool("ip", "-batch", "-", script="\n".join(lines) + "\n")
    # What leaves the bridge through this port is what the host receives.
    _shape([(port(host), host.mbit) for host in spec.hosts])


def join(host: Host) -> None:
    """Set up the interfaces of `host`; called on it, after `build_switch`."""
    lines = [
        "link set lo up",
        f"addr add {host.address}/{PREFIX_LENGTH} brd + dev {INTERFACE}",
        f"link set {INTERFACE} up",
    ]
    tool("ip", "-batch", "-", script="\n".join(lines) + "\n")
    _shape([(INTERFACE, host.mbit)])


def _shape(rates: list[tuple[str, float | None]]) -> None:
    lines = [
        f"qdisc add dev {device} root tbf rate {round(mbit * 1e6)}bit burst {_burst(mbit)} latency 50ms"
        for device, mbit in rates
        if mbit is not None
    ]
    if lines:
        tool("tc", "-batch", "-", script="\n".join(lines) + "\n")


def _burst(mbit: float) -> int:
    """Return how many bytes may pass at once.

    At least two 64 KiB packets as the stack hands them over, and what the rate lets pass in 2 ms: with less, a busy
    machine that looks at the queue too late never reaches the rate.
    """
    return max(128 * 1024, round(mbit * 1e6 / 8 * 0.002))
