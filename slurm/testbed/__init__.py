"""A real Slurm cluster on one machine: slurmctld, nodes and an origin, each on its own host (its own namespaces)."""

from .cluster import Testbed
from .errors import TestbedError
from .origin import Origin
from .packages import ensure_packages
from .spec import Spec

__all__ = ["Origin", "Spec", "Testbed", "TestbedError", "ensure_packages"]
