"""The texts of a testbed's configuration files."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from .layout import ENTER, SACCT, Layout
from .processes import ProcessId
from .spec import HEAD, Host, Spec

CONTROLLER_PORT = 6817
NODE_PORT = 6818
CLIENTS = ("sacct", "salloc", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
# The hosts cannot reach a proxy of the machine, and a client that uses a proxy does not reach the origin.
PROXY_VARIABLES = tuple(
    name for scheme in ("http", "https", "all") for name in (f"{scheme}_proxy", f"{scheme.upper()}_PROXY")
)

# Each node reports this much. Slurm does not divide it between jobs, but refuses a job that requests more.
_MEMORY_MB = 64000

_SLURM_CONF = """\
ClusterName={name}
SlurmctldHost={head}({head_address})
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its first credential expires: cred_expire + 1 seconds instead of 121.
AuthInfo=socket={munge_socket},cred_expire=5
StateSaveLocation={controller_state}
SlurmdSpoolDir={spool}
SlurmctldPidFile={controller_state}/pid
SlurmdPidFile={spool}/pid
MpiDefault=none
SwitchType=switch/none
# Plugins that do not change the machine's cgroups.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=5,sched_min_interval=0,bf_interval=1
# Nodes may report more CPUs than the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
# Within seconds, Slurm detects a dead node and ends or requeues its job.
SlurmdTimeout=10
SlurmctldTimeout=10
InactiveLimit=30
KillWait=2
UnkillableStepTimeout=10
BatchStartTimeout=5
CompleteWait=0
MessageTimeout=5
TCPTimeout=2
# `scontrol show job`, and the sacct that calls it, list a job for an hour after its end.
MinJobAge=3600
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=30 State=UP
"""


def slurm_conf(spec: Spec, layout: Layout) -> str:
    """Return slurm.conf."""
    nodes = "\n".join(
        f"NodeName={host.name} NodeAddr={host.address} CPUs={spec.cpus} RealMemory={_MEMORY_MB} State=UNKNOWN"
        for host in spec.hosts
        if host.role == "node"
    )
    return _SLURM_CONF.format(
        name=layout.name,
        head=HEAD,
        head_address=spec.host(HEAD).address,
        controller_port=CONTROLLER_PORT,
        node_port=NODE_PORT,
        munge_socket=layout.munge_socket,
        controller_state=layout.controller_state,
        spool=layout.spool("%n"),
        nodes=nodes,
    )


def cgroup_conf() -> str:
    """Return cgroup.conf: slurmd loads a cgroup plugin even if no other plugin uses it."""
    # The default plugin reads /sys/fs/cgroup, which the hosts do not have.
    return "CgroupPlugin=cgroup/v1\n"


def hosts_file(spec: Spec, host: Host) -> str:
    """Return the content of /etc/hosts for `host`."""
    lines = ["127.0.0.1 localhost"]
    for other in spec.hosts:
        is_loopback = spec.loopback_names and other.name == host.name
        lines.append(f"{'127.0.1.1' if is_loopback else other.address} {other.name}")
    return "\n".join(lines) + "\n"


def sacct_script() -> str:
    """Return the script that replaces the command sacct on every host."""
    return f'#!/bin/sh\nexec {_python(SACCT)} "$@"\n'


def client_script(command: str, head: ProcessId, layout: Layout) -> str:
    """Return a script for processes outside that runs one of Slurm's commands on the head."""
    return (
        "#!/bin/sh\n"
        "# A job inherits this PATH. On the hosts it must find Slurm's own commands, not these scripts.\n"
        f'PATH="${{PATH#{layout.clients}:}}"\n'
        f"unset {' '.join(PROXY_VARIABLES)}\n"
        f'exec {_python(ENTER)} {head.pid} {head.started} {command} "$@"\n'
    )


def _python(script: Path) -> str:
    # -I -S: ignore the user's environment and the site packages, and start in 10 ms.
    return f"{shlex.quote(sys.executable)} -I -S {shlex.quote(str(script))}"
