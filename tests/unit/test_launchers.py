"""Who am I: every launcher's variables, and the traps between them."""

from __future__ import annotations

import pytest

from tests.unit.doubles import environ
from weightferry.cluster.connect import master
from weightferry.cluster.launchers import LAUNCHERS, Topology, read_topology
from weightferry.cluster.machine import boot_id
from weightferry.errors import BadRequest, NotDistributed

TORCHRUN = environ(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4, GROUP_RANK=1)
SRUN = environ(
    SLURM_JOB_ID=7,
    SLURM_PROCID=1,
    SLURM_NTASKS=2,
    SLURM_STEP_NUM_TASKS=2,
    SLURM_LOCALID=0,
    SLURM_STEP_TASKS_PER_NODE="1(x2)",
    SLURM_NODEID=1,
    SLURM_STEP_NODELIST="w[0-1]",
)


def read(*parts: object, **variables: object) -> Topology:
    merged: dict[str, str] = {}
    for part in parts:
        assert isinstance(part, dict)
        merged |= part
    return read_topology(merged | environ(**variables), host=lambda: "h")


@pytest.mark.parametrize(
    ("variables", "topology"),
    [
        ({}, Topology(host="h")),
        (TORCHRUN, Topology(5, 8, 1, 4, "torchrun", "h", "1")),
        (SRUN, Topology(1, 2, 0, None, "slurm", "h", "1")),
        (
            environ(SUBMITIT_LOCAL_GLOBALID=1, SUBMITIT_LOCAL_NTASKS=2, SUBMITIT_LOCAL_LOCALID=1),
            Topology(1, 2, 1, 2, "submitit", "h"),
        ),
        (
            environ(
                OMPI_COMM_WORLD_RANK=3,
                OMPI_COMM_WORLD_SIZE=4,
                OMPI_COMM_WORLD_LOCAL_RANK=1,
                OMPI_COMM_WORLD_LOCAL_SIZE=2,
                PMIX_RANK=3,
            ),
            Topology(3, 4, 1, 2, "openmpi", "h"),
        ),
        (environ(PMI_RANK=3, PMI_SIZE=4, MPI_LOCALRANKID=1, MPI_LOCALNRANKS=2), Topology(3, 4, 1, 2, "pmi", "h")),
        (environ(PMI_RANK=3, PMI_SIZE=4), Topology(3, 4, 0, None, "pmi", "h")),
        (environ(PMIX_RANK=0, PMIX_SIZE=2), Topology(0, 2, 0, None, "pmix", "h")),
        (environ(RANK=0, WORLD_SIZE=1), Topology(0, 1, 0, None, "torchrun", "h")),
    ],
    ids=lambda value: value.launcher if isinstance(value, Topology) else "",
)
def test_launchers(variables: dict[str, str], topology: Topology) -> None:
    assert read(variables) == topology


def test_torchrun_inside_srun_counts() -> None:
    assert read(SRUN, TORCHRUN) == read(TORCHRUN)


def test_a_batch_script_is_alone_though_its_variables_name_many_tasks() -> None:
    script = environ(SLURM_JOB_ID=7, SLURM_PROCID=0, SLURM_NTASKS=8, SLURM_LOCALID=0, SLURM_NODEID=0)
    assert read(script) == Topology(host="h")


def test_a_shell_with_half_of_the_variables_is_alone() -> None:
    assert read(environ(WORLD_SIZE=8)) == read(environ(LOCAL_RANK=0)) == Topology(host="h")


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.name)
@pytest.mark.parametrize(("rank", "size"), [(4, 4), (-1, 4), ("x", 4), (0, ""), (0, 0), ("1.5", 4)])
def test_contradictions(launcher, rank: object, size: object) -> None:
    with pytest.raises(BadRequest, match=rf"{launcher.rank}|{launcher.world_size}"):
        read({launcher.rank: str(rank), launcher.world_size: str(size)})


def test_every_launcher_wins_over_the_next() -> None:
    everything: dict[str, str] = {}
    for place, launcher in reversed(list(enumerate(LAUNCHERS))):
        everything |= {launcher.rank: str(place), launcher.world_size: "100"}
        assert read(everything).launcher == launcher.name


def test_the_real_environment() -> None:
    assert read_topology(host=lambda: "h").host == "h"


def test_one_machine_has_one_boot_id() -> None:
    assert boot_id() == boot_id() != ""


class TestMaster:
    def test_what_is_set_is_kept(self) -> None:
        given = environ(MASTER_ADDR="a", MASTER_PORT=1)
        assert master(read(TORCHRUN), given) == given

    def test_one_node_needs_no_name(self) -> None:
        local = read(environ(SUBMITIT_LOCAL_GLOBALID=1, SUBMITIT_LOCAL_NTASKS=2))
        assert master(local, {})["MASTER_ADDR"] == "127.0.0.1"

    @pytest.mark.parametrize(("nodes", "first"), [("w3", "w3"), ("w3,w5", "w3")])
    def test_slurm(self, nodes: str, first: str) -> None:
        found = master(read(SRUN), environ(SLURM_STEP_NODELIST=nodes, SLURM_JOB_ID=7, SLURM_STEP_ID=0))
        assert found["MASTER_ADDR"] == first
        assert 20000 <= int(found["MASTER_PORT"]) < 30000

    def test_ranks_of_a_step_agree_on_a_port_and_steps_differ(self) -> None:
        def port(step: int, rank: int) -> str:
            variables = environ(SLURM_STEP_NODELIST="w0", SLURM_JOB_ID=7, SLURM_STEP_ID=step, SLURM_PROCID=rank)
            return master(read(SRUN), variables)["MASTER_PORT"]

        assert port(0, 0) == port(0, 1) != port(1, 0)

    def test_mpi_on_several_nodes_does_not_say(self) -> None:
        with pytest.raises(NotDistributed, match="MASTER_ADDR"):
            master(read(environ(PMI_RANK=0, PMI_SIZE=4)), {})
