"""Every launcher's variables, whole, half and contradictory."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from dualroute.errors import UserError
from dualroute.training.parallel import slurm_port
from dualroute.training.parallel.environment import (
    DualRouteEnvironment,
    World,
    check_port,
    detect_world,
    refuse_forgotten_srun,
    strip_local_rank,
)

RENDEZVOUS = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
RANK_3_OF_4 = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **RENDEZVOUS}
SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "localhost,elsewhere[1-3]",
}


def test_nothing_set_is_one_process() -> None:
    assert detect_world({}) == World() == World(0, 0, 1, 1, "none")


@pytest.mark.parametrize(
    ("launcher", "variables"),
    [
        ("torchrun", {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}),
        ("deepspeed", {"CROSS_RANK": "1", "CROSS_SIZE": "2", "LOCAL_SIZE": "2"}),
        ("environment", {"LOCAL_WORLD_SIZE": "2"}),
    ],
)
def test_rank_variables_on_two_nodes(launcher: str, variables: dict[str, str]) -> None:
    world = detect_world(RANK_3_OF_4 | variables)
    assert (world.rank, world.local_rank, world.world_size, world.num_nodes) == (3, 1, 4, 2)
    assert (world.launcher, world.node_rank, world.local_world_size) == (launcher, 1, 2)
    environment = DualRouteEnvironment(world)
    assert (environment.main_address, environment.main_port) == ("10.0.0.1", 29500)
    assert environment.creates_processes_externally
    environment.set_world_size(7)
    environment.set_global_rank(7)
    assert (environment.world_size(), environment.global_rank(), environment.node_rank()) == (4, 3, 1)


def test_srun_on_two_nodes() -> None:
    world = detect_world(SLURM)
    assert (world.rank, world.local_rank, world.world_size, world.num_nodes) == (3, 1, 4, 2)
    assert (world.launcher, world.node_rank, world.main_address) == ("slurm", 1, "localhost")
    assert detect_world(SLURM | RENDEZVOUS).main_address == "10.0.0.1"
    assert detect_world(SLURM | RENDEZVOUS).main_port == 29500


def test_slurm_port_is_shared_by_ranks_and_not_by_steps_or_jobs() -> None:
    port = detect_world(SLURM).main_port
    assert 15000 <= port < 30000
    assert (
        detect_world(SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}).main_port
        == port
    )
    assert detect_world(SLURM | {"SLURM_STEP_ID": "1"}).main_port != port
    assert detect_world(SLURM | {"SLURM_JOB_ID": "4243"}).main_port != port


def test_a_slurm_job_takes_a_port_that_nobody_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    first = next(port for port in slurm_port.ports_of_job(os.environ) if slurm_port.can_listen(port) is None)

    def chosen() -> int:
        assert slurm_port.main() == 0
        return int(capsys.readouterr().out)

    assert chosen() == first
    with socket.socket() as other:
        other.bind(("", first))
        other.listen()
        assert chosen() not in (first, next(slurm_port.ports_of_job({"SLURM_JOB_ID": "2"})))
    monkeypatch.setattr(slurm_port, "can_listen", lambda port: OSError())
    with pytest.raises(UserError, match="no port of 15000 to 29999 is free"):
        slurm_port.main()


def test_a_step_smaller_than_its_job() -> None:
    world = detect_world(
        SLURM | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "1"}
    )
    assert (world.world_size, world.num_nodes, world.main_address) == (4, 1, "127.0.0.1")


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967290"}, {"SLURM_STEP_ID": "4294967291"}])
def test_inside_an_allocation_without_srun_is_one_process(step: dict[str, str]) -> None:
    """The batch script and an interactive shell see SLURM_NTASKS too, but nobody started the other tasks."""
    variables = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    assert detect_world(variables | step) == World()


def test_torchrun_inside_srun_wins() -> None:
    assert detect_world(SLURM | RANK_3_OF_4 | {"TORCHELASTIC_RUN_ID": "x"}).launcher == "torchrun"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "RANK=0 set but WORLD_SIZE, LOCAL_RANK missing"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 set but RANK, LOCAL_RANK missing"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 set but RANK, WORLD_SIZE missing"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR, MASTER_PORT missing"),
        (RANK_3_OF_4 | {"RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
        (RANK_3_OF_4 | {"RANK": "x"}, "RANK='x' is not a number"),
        (RANK_3_OF_4 | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is not a port"),
        (RANK_3_OF_4 | {"LOCAL_WORLD_SIZE": "3"}, "WORLD_SIZE=4 is not a multiple of LOCAL_WORLD_SIZE=3"),
        (RANK_3_OF_4 | {"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1 is not below LOCAL_WORLD_SIZE=1"),
        (SLURM | {"SLURM_NTASKS": "5"}, "5 tasks on 2 nodes.*--ntasks-per-node"),
        (SLURM | {"SLURM_JOB_NODELIST": "no-such-host.invalid"}, "no-such-host.invalid.*MASTER_ADDR"),
    ],
)
def test_half_set_and_contradictory_variables(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        detect_world(variables)
    assert "\n" not in str(caught.value)


def test_strip_local_rank() -> None:
    argv = [
        "--local_rank=1",
        "pretrain",
        "--local-rank=0",
        "--a",
        "b",
        "--local_rank",
        "3",
        "--local_rank_x=1",
    ]
    assert strip_local_rank(argv) == ["pretrain", "--a", "b", "--local_rank_x=1"]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with contextlib.closing(socket.socket()) as other:
        other.bind(("", 0))
        other.listen()
        yield other.getsockname()[1]


def test_only_who_will_listen_minds_a_taken_port(taken_port: int) -> None:
    def world(**fields: object) -> World:
        return World(**({"world_size": 2, "launcher": "deepspeed", "main_port": taken_port} | fields))  # type: ignore[arg-type]

    with pytest.raises(UserError, match=f"port {taken_port} .*deepspeed --master_port"):
        check_port(world())
    with pytest.raises(UserError, match=f"port {taken_port} .*export MASTER_PORT=N before srun"):
        check_port(world(launcher="slurm"))
    check_port(world(rank=1))
    check_port(world(launcher="torchrun"))  # torchrun's own store is who listens there
    check_port(world(world_size=1))


def test_trainer_numbers_must_be_the_launchers() -> None:
    environment = DualRouteEnvironment(detect_world(RANK_3_OF_4 | {"LOCAL_WORLD_SIZE": "2"}))
    environment.validate_settings(num_devices=2, num_nodes=2)
    with pytest.raises(UserError, match="devices=4 and num_nodes=1"):
        environment.validate_settings(num_devices=4, num_nodes=1)


def test_one_process_finds_a_port_and_keeps_it() -> None:
    environment = DualRouteEnvironment(World())
    assert environment.main_port == environment.main_port > 0


JOB = {name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_NNODES")}


@pytest.mark.parametrize(
    ("variables", "tasks"),
    [
        (JOB, 4),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS_PER_NODE": "8", "SLURM_NNODES": "2"}, 16),
        (JOB | {"SLURM_STEP_ID": "4294967291"}, 4),  # the batch script
        (JOB | {"SLURM_JOB_NAME": "pretrain"}, 4),
    ],
)
def test_a_job_of_several_tasks_without_srun_is_refused(variables: dict[str, str], tasks: int) -> None:
    with pytest.raises(UserError, match=rf"this job has {tasks} tasks .*start it with srun"):
        refuse_forgotten_srun(detect_world(variables), variables)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_NTASKS": "4"},  # no job
        JOB | {"SLURM_NTASKS": "1"},
        JOB | {"SLURM_JOB_NAME": "bash"},
        JOB | {"SLURM_JOB_NAME": "interactive"},
        SLURM,  # one of the job's tasks
        JOB | RANK_3_OF_4 | {"TORCHELASTIC_RUN_ID": "x"},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0"},
    ],
)
def test_who_was_started_as_it_should_be_is_not_refused(variables: dict[str, str]) -> None:
    refuse_forgotten_srun(detect_world(variables), variables)
