"""A server that behaves like the Hugging Face Hub, for tests: `HubServer`, and the faults to inject into it."""

from weightferry.testing.hub.faults import Fault, Faults
from weightferry.testing.hub.records import Kind, RequestRecord
from weightferry.testing.hub.repos import Gated, RepoType
from weightferry.testing.hub.server import HubOptions, HubServer

__all__ = ["Fault", "Faults", "Gated", "HubOptions", "HubServer", "Kind", "RepoType", "RequestRecord"]
