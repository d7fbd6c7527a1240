"""Which servers are in rotation, and why the others are not; for one event loop."""

import asyncio
import logging
from collections.abc import Mapping, Sequence

from omnigrpo.model.config import DecoderConfig
from omnigrpo.rollout.interface import RolloutError
from omnigrpo.rollout.router_process import RouterProcess
from omnigrpo.rollout.server_client import ServerClient, ServerLostError
from omnigrpo.rollout.server_config import ServerConfig
from omnigrpo.rollout.server_probe import ServerInfo, probe, version_of

_log = logging.getLogger(__name__)

_FAILURES = 2
"""Looks in a row that a server may fail before it is given up."""


class ServerPool:
    """The servers of one engine, behind the router that it started."""

    def __init__(
        self, client: ServerClient, urls: Sequence[str], decoder: DecoderConfig, config: ServerConfig
    ) -> None:
        self._client, self._urls = client, tuple(urls)
        self._decoder, self._config = decoder, config
        self._alive: dict[str, ServerInfo] = {}
        self._lost: dict[str, str] = {}
        """Why a server is out of rotation."""
        self._router: RouterProcess | None = None
        self._changing = asyncio.Lock()
        self.hung = asyncio.Event()
        """Set, and replaced, when a server was given up that holds its connections open: calls are made anew."""

    @property
    def servers(self) -> tuple[ServerInfo, ...]:
        """Those in rotation."""
        return tuple(self._alive.values())

    @property
    def router(self) -> RouterProcess:
        """It is there once ``open`` has returned."""
        assert self._router is not None
        return self._router

    async def open(self) -> None:
        """Ask every server, and start the router. Raises RolloutError that names each one that cannot be used."""
        found = await self._probe(self._urls)
        problems = [f"{problem}" for problem in found.values() if isinstance(problem, str)]
        if problems:
            raise RolloutError("not all of rollout.servers can be used: " + "; ".join(problems))
        self._alive = {url: info for url, info in found.items() if isinstance(info, ServerInfo)}
        self._router = RouterProcess(self._client, self._urls)
        await self._router.wait_for(self._urls)

    def error(self) -> RolloutError:
        """No server is left."""
        reasons = "; ".join(self._lost[url] for url in self._urls if url in self._lost)
        return RolloutError(
            f"none of the {len(self._urls)} rollout servers is left: {reasons}. Start them again; a run goes on from "
            "its last checkpoint with --resume"
        )

    async def check(self, version: str) -> None:
        """Give up the servers that do not answer or hold other weights; RolloutError when none is left.

        A router that has ended is started again.
        """
        async with self._changing:
            urls = list(self._alive)
            answers = await asyncio.gather(*(self._problem(url, version) for url in urls))
            for url, problem in zip(urls, answers, strict=True):
                if problem is not None:
                    await self._take_out(url, problem)
            if self._alive:
                await self._revive_router()
        if not self._alive:
            raise self.error()

    async def watch(self, failures: dict[str, int]) -> None:
        """Have every server draw a token, and give up one that fails too often in a row; ``failures`` counts."""
        urls = list(self._alive)
        answers = await asyncio.gather(*(self._health(url) for url in urls))
        async with self._changing:
            for url, problem in zip(urls, answers, strict=True):
                failures[url] = 0 if problem is None else failures.get(url, 0) + 1
                if problem is not None and failures[url] >= _FAILURES and url in self._alive:
                    await self._take_out(url, problem)
                    self.hung.set()
                    self.hung = asyncio.Event()

    async def take_out(self, reasons: Mapping[str, str]) -> None:
        """Out of rotation with these."""
        async with self._changing:
            for url, reason in reasons.items():
                await self._take_out(url, reason)

    async def returning(self) -> list[ServerInfo]:
        """Servers out of rotation that answer and fit again; whoever gives them the weights puts them back."""
        found = await self._probe([url for url in self._urls if url not in self._alive])
        return [info for info in found.values() if isinstance(info, ServerInfo)]

    async def put_back(self, infos: Sequence[ServerInfo]) -> None:
        """Into rotation with these."""
        async with self._changing:
            await self._revive_router()
            for info in infos:
                await self.router.add(info.url)
                self._alive[info.url] = info
                del self._lost[info.url]
            await self.router.wait_for(list(self._alive))

    def close(self) -> None:
        """End the router; the servers go on."""
        if self._router is not None:
            self._router.close()

    async def _take_out(self, url: str, reason: str) -> None:
        self._lost[url] = reason
        if self._alive.pop(url, None) is not None:
            try:
                await self.router.remove(url)
            except (ServerLostError, RolloutError) as error:
                # A router that is gone is started again without it; one that keeps it costs a group an attempt.
                _log.warning("the router did not let go of %s: %s", url, error)

    async def _revive_router(self) -> None:
        if not self.router.is_running:
            self.router.close()
            self._router = RouterProcess(self._client, list(self._alive))
            await self._router.wait_for(list(self._alive))

    async def _probe(self, urls: Sequence[str]) -> dict[str, ServerInfo | str]:
        async def one(url: str) -> ServerInfo | str:
            try:
                return await probe(
                    self._client,
                    url,
                    decoder=self._decoder,
                    media=self._config.media,
                    timeout_seconds=self._config.probe_timeout_seconds,
                )
            except (RolloutError, ServerLostError) as error:
                return str(error)

        return dict(zip(urls, await asyncio.gather(*map(one, urls)), strict=True))

    async def _problem(self, url: str, version: str) -> str | None:
        try:
            found = await version_of(self._client, url, timeout_seconds=self._config.probe_timeout_seconds)
        except (RolloutError, ServerLostError) as error:
            return str(error)
        if found != version:
            return f"{url} holds weights of version {found}, not {version}: it was started anew"
        return None

    async def _health(self, url: str) -> str | None:
        try:
            await self._client.get(f"{url}/health", timeout_seconds=self._config.probe_timeout_seconds)
        except (RolloutError, ServerLostError) as error:
            return str(error)
        return None
