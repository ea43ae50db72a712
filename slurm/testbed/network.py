"""The network of a testbed: one bridge, and a veth pair from it to each host.

The bridge is in the supervisor's network namespace, and each host has its own namespace. So the testbed does not change
the machine's interfaces, all testbeds use the same names and addresses, and the network ends with its processes.
"""

from __future__ import annotations

from .spec import PREFIX_LENGTH, Host, Spec
from .tools import run_tool

_BRIDGE = "br0"
INTERFACE = "eth0"
"""The interface of every host."""


def port(host: Host) -> str:
    """Return the name of the bridge port that leads to `host`."""
    return f"to-{host.name}"


def build_bridge(spec: Spec, pids: dict[str, int]) -> None:
    """Create the bridge and connect every host.

    Parameters
    ----------
    spec
        The testbed.
    pids
        By host, the PID of a process in its network namespace, as this process sees it.
    """
    lines = [f"link add {_BRIDGE} type bridge stp_state 0 forward_delay 0", f"link set {_BRIDGE} up"]
    for host in spec.hosts:
        lines.append(f"link add {port(host)} type veth peer name {INTERFACE} netns {pids[host.name]}")
        lines.append(f"link set {port(host)} master {_BRIDGE} up")
    run_tool("ip", "-batch", "-", script="\n".join(lines) + "\n")
    # The bytes that leave the bridge through this port are the bytes that the host receives.
    _limit_rates([(port(host), host.mbit) for host in spec.hosts])


def connect_host(host: Host) -> None:
    """Set up the interfaces of `host`; call it in the namespaces of the host, after `build_bridge`."""
    lines = [
        "link set lo up",
        f"addr add {host.address}/{PREFIX_LENGTH} brd + dev {INTERFACE}",
        f"link set {INTERFACE} up",
    ]
    run_tool("ip", "-batch", "-", script="\n".join(lines) + "\n")
    _limit_rates([(INTERFACE, host.mbit)])


def _limit_rates(rates: list[tuple[str, float | None]]) -> None:
    lines = [
        f"qdisc add dev {device} root tbf rate {round(mbit * 1e6)}bit burst {_burst(mbit)} latency 50ms"
        for device, mbit in rates
        if mbit is not None
    ]
    if lines:
        run_tool("tc", "-batch", "-", script="\n".join(lines) + "\n")


def _burst(mbit: float) -> int:
    """Return the burst size in bytes.

    At least two packets of 64 KiB, as the network stack passes them, and the bytes of 2 ms at the rate. With less, a
    busy machine that serves the queue too late never reaches the rate.
    """
    return max(128 * 1024, round(mbit * 1e6 / 8 * 0.002))
