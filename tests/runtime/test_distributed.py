"""The world alone and as two real gloo processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import nn

from omnigrpo.runtime.distributed import World

TWO_PROCESSES = """
import torch
from torch import nn
from omnigrpo.runtime import distributed
from omnigrpo.runtime.distributed import World

distributed._BUCKET_ELEMENTS = 8  # several buckets
world = World.from_environment()
assert (world.size, world.is_main) == (2, world.rank == 0)

counts = torch.tensor([3, 10 + world.rank])
assert world.sum(counts).tolist() == [6, 21]
assert counts.tolist() == [3, 10 + world.rank], "the input must be left alone"

parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (5,), (4,), ())]
parameters.append(nn.Parameter(torch.zeros(3, dtype=torch.float64)))
for index, parameter in enumerate(parameters):
    if index != 2 and (index != 1 or world.rank == 0):  # 1 has a gradient on rank 0 only, 2 on none
        parameter.grad = torch.full_like(parameter, 10.0 * index + world.rank)
world.sum_gradients(parameters)
expected = [1.0, 10.0, None, 61.0, 81.0]
for parameter, value in zip(parameters, expected):
    if value is None:
        assert parameter.grad is None
    else:
        assert parameter.grad.shape == parameter.shape
        assert bool((parameter.grad == value).all()), (parameter.grad, value)

world.barrier()
world.close()
assert not torch.distributed.is_initialized()
print(f"rank {world.rank} is done")
"""


def test_two_processes_sum_and_agree(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, output
        assert f"rank {rank} is done" in output


def test_alone_nothing_is_initialised(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = World.from_environment()
    assert world == World(rank=0, size=1)
    assert world.is_main
    tensor = torch.tensor([2.0, 3.0])
    total = world.sum(tensor)
    assert total.tolist() == [2.0, 3.0]
    assert total.data_ptr() != tensor.data_ptr()
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    world.sum_gradients([parameter])
    assert parameter.grad.tolist() == [1.0, 1.0]
    world.barrier()
    world.close()
    assert not torch.distributed.is_initialized()


def test_torchrun_with_one_process_is_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert World.from_environment() == World()


@pytest.mark.parametrize("rank", [None, "x", "7"])
def test_half_an_environment_is_an_error(monkeypatch: pytest.MonkeyPatch, rank: str | None):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(ValueError, match="RANK"):
        World.from_environment()
