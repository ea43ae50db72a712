"""Find the network interface that leads to another host."""

from __future__ import annotations

import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915  # ioctl(2): the IPv4 address of an interface; the number from linux/sockios.h


def interface_towards(host: str) -> str:
    """Return the interface whose address this machine uses towards `host`; empty if there is none."""
    try:
        address = socket.getaddrinfo(host, 9, socket.AF_INET, socket.SOCK_DGRAM)[0][4]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # on a datagram socket this asks the routing table and sends nothing
            local = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                if _address_of(probe, name) == local:
                    return name
    except OSError:
        return ""
    return ""


def _address_of(probe: socket.socket, interface: str) -> str:
    try:
        reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    except OSError:
        return ""  # an interface without an IPv4 address
    return socket.inet_ntoa(reply[20:24])
