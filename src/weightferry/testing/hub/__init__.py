"""A server for tests that behaves like the Hugging Face Hub, and the faults that a test injects into it."""

from weightferry.testing.hub.faults import Fault, Faults
from weightferry.testing.hub.repositories import Gated, RepoType
from weightferry.testing.hub.request_log import Kind, RequestRecord
from weightferry.testing.hub.server import HubOptions, HubServer

__all__ = ["Fault", "Faults", "Gated", "HubOptions", "HubServer", "Kind", "RepoType", "RequestRecord"]
