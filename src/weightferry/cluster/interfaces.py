"""Find the addresses and network interfaces of this machine that lead to another one."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915  # ioctl(2): the IPv4 address of an interface; the number from linux/sockios.h


def local_address(host: str) -> str:
    """Return the IP address that this machine uses towards `host`, a name or an address; empty if there is no route."""
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return ""
    for family, kind, protocol, _, address in sorted(found, key=lambda one: one[0] != socket.AF_INET):
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # on a datagram socket this asks the routing table and sends nothing
                return str(probe.getsockname()[0])
        except OSError:
            continue
    return ""


def interface_of(address: str) -> str:
    """Return the network interface that has an IP address of this machine; empty if none has it."""
    names = [name for _, name in socket.if_nameindex()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return next((name for name in names if address in (_ipv4_of(probe, name), *_ipv6_of(name))), "")


def interface_towards(host: str) -> str:
    """Return the interface whose address this machine uses towards `host`; empty if there is none."""
    address = local_address(host)
    return interface_of(address) if address else ""


def is_loopback(address: str) -> bool:
    """Return whether an IP address is one that other machines cannot reach."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _ipv4_of(probe: socket.socket, interface: str) -> str:
    try:
        reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    except OSError:
        return ""  # an interface without an IPv4 address
    return socket.inet_ntoa(reply[20:24])


def _ipv6_of(interface: str) -> list[str]:
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return []  # a kernel without IPv6
    # if_inet6: address in hexadecimal, index, prefix length, scope, flags, name of the interface.
    fields = [line.split() for line in lines]
    return [str(ipaddress.IPv6Address(bytes.fromhex(one[0]))) for one in fields if one[-1] == interface]
