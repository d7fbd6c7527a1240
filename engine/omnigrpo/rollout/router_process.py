"""SGLang's router as a child process: started, asked who is in it, ended."""

import asyncio
import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from omnigrpo.rollout.interface import RolloutError
from omnigrpo.rollout.server_client import ServerClient, ServerLostError

ROUTING_KEY = "X-SMG-Routing-Key"
"""Header by which the policy ``manual`` sends all requests of a group to the server that got the first one."""
_START_SECONDS = 60.0
_CHANGE_SECONDS = 30.0
_POLL_SECONDS = 0.02
_SHOWN = 2000


class RouterProcess:
    """Sends each group to the server with the fewest requests under way.

    It retries nothing and breaks no circuit: which servers are in rotation, and what becomes of a group whose server is
    lost, is decided by whoever adds and removes them.
    """

    def __init__(self, client: ServerClient, servers: Sequence[str]) -> None:
        """Start it on a free port of this machine; raises ImportError without sglang-router."""
        if importlib.util.find_spec("sglang_router") is None:
            raise ImportError(
                "rollouts on servers go through SGLang's router, which is not installed: "
                "pip install 'omnigrpo[servers]'"
            )
        self._client = client
        self._log = tempfile.TemporaryFile(mode="w+", prefix="router-")  # noqa: SIM115 - closed with the process
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "omnigrpo.rollout.router_main"],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(_settings(port, servers)) + "\n")
        self._process.stdin.close()

    @property
    def process_id(self) -> int:
        """Of the child."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the child has not ended."""
        return self._process.poll() is None

    async def wait_for(self, servers: Sequence[str]) -> None:
        """Wait until exactly these servers are in it; RolloutError when it ends or that takes too long."""
        begun = time.monotonic()
        while True:
            if self._process.poll() is not None:
                raise RolloutError(
                    f"SGLang's router ended with status {self._process.returncode}: {self._words()}"
                )
            with contextlib.suppress(ServerLostError):
                if {url for url, known in (await self._workers()).items() if known["is_healthy"]} == set(
                    servers
                ):
                    return
            if time.monotonic() - begun > _START_SECONDS:
                raise RolloutError(
                    f"SGLang's router did not take {', '.join(servers)} within {_START_SECONDS} s: {self._words()}"
                )
            await asyncio.sleep(_POLL_SECONDS)

    async def add(self, server: str) -> None:
        """Put a server into rotation; ``wait_for`` says when it is."""
        await self._client.post(f"{self.url}/workers", {"url": server}, timeout_seconds=_CHANGE_SECONDS)

    async def remove(self, server: str) -> None:
        """Take a server out of rotation; requests that it has stay with it."""
        known = (await self._workers()).get(server)
        if known is not None:
            await self._client.delete(f"{self.url}/workers/{known['id']}", timeout_seconds=_CHANGE_SECONDS)

    def close(self) -> None:
        """End the process; may be called twice."""
        if self._process.poll() is None:
            self._process.kill()  # It holds nothing; asked politely, it would wait for requests under way.
            self._process.wait()
        self._log.close()

    async def _workers(self) -> dict[str, Mapping[str, object]]:
        listed = await self._client.get(f"{self.url}/workers", timeout_seconds=_CHANGE_SECONDS)
        return {known["url"]: known for known in listed["workers"]}

    def _words(self) -> str:
        """The end of what it printed."""
        self._log.seek(0)
        return self._log.read()[-_SHOWN:].strip() or "it printed nothing"


def _settings(port: int, servers: Sequence[str]) -> dict[str, object]:
    """Its arguments; ``/health`` of SGLang would take a paused server for a dead one."""
    return {
        "parent": os.getpid(),
        "host": "127.0.0.1",
        "port": port,
        "worker_urls": list(servers),
        "policy": "manual",
        "assignment_mode": "min_load",
        "max_payload_size": 1 << 32,
        "request_timeout_secs": 7 * 86400,
        "disable_retries": True,
        "disable_circuit_breaker": True,
        "disable_health_check": True,
        "worker_startup_check_interval": 1,
        "worker_startup_timeout_secs": int(_START_SECONDS),
        "log_level": "warn",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
