"""Weights from this process to all devices of all servers at once, over a torch.distributed group of their own.

The trainer is rank 0; the servers' devices follow in order. The group is built from torch's process-group classes
rather than ``init_process_group``: the trainer may be in a default group with other trainers. Its keys in the store are
those that SGLang's ``init_custom_process_group`` (0.5.17) and torch's ``_new_process_group_helper`` make.
"""

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage] - documented there
    ProcessGroupGloo,
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.distributed.distributed_c10d import BroadcastOptions

from omnigrpo.rollout.interface import RolloutError
from omnigrpo.rollout.server_client import ServerClient, ServerLostError
from omnigrpo.rollout.server_probe import ServerInfo

Bucket = Sequence[tuple[str, Tensor]]
Problems = dict[str, RolloutError | ServerLostError]
"""What went wrong, by server."""

_GRACE_SECONDS = 5.0
_LEAVE_SECONDS = 10.0
_names = itertools.count()


class WeightGroup:
    """This process and some servers; of no use once a call of it has failed."""

    def __init__(
        self,
        client: ServerClient,
        servers: Sequence[ServerInfo],
        *,
        device: torch.device,
        address: str | None,
        timeout_seconds: float,
    ) -> None:
        self._client = client
        self.servers = tuple(servers)
        self._device = device
        self._address = address or address_towards([server.url for server in servers])
        self._timeout = timeout_seconds
        self._name = f"omnigrpo-weights-{os.getpid()}-{next(_names)}"
        self._group: Any = None
        """A ProcessGroupGloo or ProcessGroupNCCL, whose stubs lack the collectives."""
        self._store = TCPStore(
            "0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_seconds)
        )

    async def join(self) -> Problems:
        """Build it with the servers; returns what went wrong, by server."""
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        size, calls = 1, {}
        for server in self.servers:
            calls[server.url] = self._client.post(
                f"{server.url}/init_weights_update_group",
                {
                    "master_address": self._address,
                    "master_port": self._store.port,
                    "rank_offset": size,
                    "world_size": 1 + sum(other.devices for other in self.servers),
                    "group_name": self._name,
                    "backend": backend,
                },
                timeout_seconds=self._timeout,
            )
            size += server.devices
        return await self._together(calls, lambda: self._build(backend, size))

    async def send(self, bucket: Bucket, *, label: str | None) -> Problems:
        """Broadcast one bucket; with a label of the version it is the last one. Returns what went wrong, by server.

        The servers forget their prefixes with the last bucket.
        """
        flat = torch.cat([tensor.contiguous().view(torch.uint8).flatten() for _, tensor in bucket])
        content = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": self._name,
            "load_format": "flattened_bucket",
            "flush_cache": label is not None,
            "weight_version": label,
        }
        calls = {
            server.url: self._client.post(
                f"{server.url}/update_weights_from_distributed", content, timeout_seconds=self._timeout
            )
            for server in self.servers
        }
        return await self._together(calls, lambda: self._broadcast(flat))

    async def leave(self) -> None:
        """Take it apart on all sides; a server that does not answer keeps its half."""
        self._abandon()
        await asyncio.gather(*(self._leave(server.url) for server in self.servers))

    async def _leave(self, url: str) -> None:
        with contextlib.suppress(ServerLostError, RolloutError):
            await self._client.post(
                f"{url}/destroy_weights_update_group",
                {"group_name": self._name},
                timeout_seconds=_LEAVE_SECONDS,
            )

    async def _together(
        self, calls: Mapping[str, Coroutine[Any, Any, Any]], own: Callable[[], None]
    ) -> Problems:
        """Make the servers' calls while ``own`` runs in a thread; at the first failure it is all given up."""
        tasks = {url: asyncio.ensure_future(call) for url, call in calls.items()}
        mine = asyncio.get_running_loop().run_in_executor(None, own)
        waited = {*tasks.values(), mine}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_EXCEPTION)
        except asyncio.CancelledError:
            self._abandon()
            for task in tasks.values():
                task.cancel()
            raise
        if any(task.done() and task.exception() for task in waited):
            await asyncio.wait(waited, timeout=_GRACE_SECONDS)
            self._abandon()  # Whoever waits for a rank that is gone gets an error now.
            await asyncio.wait(waited, timeout=_GRACE_SECONDS)
        problems = {
            url: problem for url, task in tasks.items() if (problem := _problem(url, task)) is not None
        }
        if problems:
            return problems
        if not mine.done():
            raise RolloutError("the weights could not be sent: this side of the transfer does not end")
        if (error := mine.exception()) is not None:
            raise RolloutError(f"the weights could not be sent: {error}") from error
        return problems

    def _build(self, backend: str, size: int) -> None:
        named = PrefixStore(f"{self._name}/", PrefixStore(self._name, self._store))
        timeout = timedelta(seconds=self._timeout)
        if backend == "gloo":
            self._group = ProcessGroupGloo(PrefixStore("cpu/", named), 0, size, timeout=timeout)
            return
        torch.cuda.set_device(self._device)
        options: Any = torch.distributed.ProcessGroupNCCL.Options()
        options._timeout = timeout
        options.global_ranks_in_group = []
        options.group_name = self._name
        self._group = torch.distributed.ProcessGroupNCCL(PrefixStore("cuda/", named), 0, size, options)

    def _broadcast(self, flat: Tensor) -> None:
        assert self._group is not None
        if flat.is_cuda:
            torch.cuda.set_device(flat.device)
        options = BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self._group.broadcast([flat], options).wait(timedelta(seconds=self._timeout))
        if flat.is_cuda:
            torch.cuda.synchronize(flat.device)

    def _abandon(self) -> None:
        """Close this side's connections."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()


def address_towards(urls: Sequence[str]) -> str:
    """The address by which these servers reach this machine: that of the way to the first one on another machine."""
    found = "127.0.0.1"
    for url in urls:
        parts = urlsplit(url)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((parts.hostname, parts.port or 80))  # Sends nothing: it only chooses the interface.
            found = probe.getsockname()[0]
        if not found.startswith("127."):
            break
    return found


def _problem(url: str, task: asyncio.Future[Any]) -> RolloutError | ServerLostError | None:
    """Why a call failed; one that is still waiting is given up."""
    if not task.done():
        task.cancel()
        return ServerLostError(f"{url} did not answer after another part of the transfer had failed")
    error = task.exception()
    if error is not None and not isinstance(error, RolloutError | ServerLostError):
        raise error
    return error
