"""Who am I: every launcher's variables, and the traps between them."""

from __future__ import annotations

import pytest

from tests.unit.doubles import environ
from weightferry.cluster.launchers import LAUNCHERS, Topology, read_hints, read_topology
from weightferry.cluster.machine import boot_id
from weightferry.cluster.rendezvous import master
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


@pytest.mark.parametrize(("given", "missing"), [({"WORLD_SIZE": 8}, "RANK"), ({"RANK": 0}, "WORLD_SIZE")])
def test_half_of_the_variables(given: dict[str, object], missing: str) -> None:
    with pytest.raises(BadRequest, match=f"is set, and {missing} is not. Set both"):
        read(environ(**given))
    # A launcher that sets its own variables needs no other ones.
    assert read(SRUN, **given) == read(SRUN)


def test_variables_that_make_no_rank() -> None:
    assert read(environ(LOCAL_RANK=0)) == read(environ(WORLD_SIZE=1)) == Topology(host="h")
    # What many batch scripts export for their srun.
    assert read(environ(WORLD_SIZE=8, SLURM_JOB_ID=7, SLURM_PROCID=0)) == Topology(host="h")


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.name)
@pytest.mark.parametrize(("rank", "size"), [(4, 4), (-1, 4), ("x", 4), (0, ""), (0, 0), ("1.5", 4)])
def test_contradictions(launcher, rank: object, size: object) -> None:
    variables = {launcher.rank: str(rank), launcher.world_size: str(size)}
    with pytest.raises(BadRequest, match=rf"{launcher.rank}|{launcher.world_size}"):
        read(variables)
    assert read_hints(variables, host=lambda: "h") == Topology(host="h")


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK must be a whole number, it is 'x'"),
        ({"LOCAL_RANK": 4}, "LOCAL_RANK=4 is not a rank of LOCAL_WORLD_SIZE=4"),
        ({"RANK": 0, "WORLD_SIZE": 1}, "LOCAL_WORLD_SIZE=4 ranks on one node are more than WORLD_SIZE=1"),
    ],
)
def test_contradictions_on_a_node(changed: dict[str, object], text: str) -> None:
    with pytest.raises(BadRequest, match=text):
        read(TORCHRUN, **changed)


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

    @pytest.mark.parametrize("port", ["x", "0", "-1", "65536", "80.5", "²"])
    def test_a_port_that_is_none(self, port: str) -> None:
        with pytest.raises(BadRequest, match=f"MASTER_PORT must be a number from 1 to 65535, it is '{port}'"):
            master(read(TORCHRUN), environ(MASTER_ADDR="a", MASTER_PORT=port))

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
