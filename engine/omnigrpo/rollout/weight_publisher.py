"""Brings all servers of a pool to one version of the weights; those that cannot follow leave the rotation."""

import asyncio
from collections.abc import Callable, Sequence

import torch

from omnigrpo.rollout.interface import RolloutError
from omnigrpo.rollout.server_client import ServerClient, ServerLostError
from omnigrpo.rollout.server_config import ServerConfig
from omnigrpo.rollout.server_pool import ServerPool
from omnigrpo.rollout.server_probe import ServerInfo
from omnigrpo.rollout.weight_broadcast import Bucket, Problems, WeightGroup

Content = Callable[[ServerInfo], dict[str, object]]
"""What a server is sent with a command."""


def nothing(info: ServerInfo) -> dict[str, object]:
    """For a command that needs no content."""
    return {}


def memory_tags(info: ServerInfo) -> dict[str, object]:
    """What a server is to release, and to restore: without a copy on the host its weights would be lost."""
    return {} if info.keeps_weights else {"tags": ["kv_cache"]}


class WeightPublisher:
    """Keeps the group that weights are sent over as long as the same servers take part; for one event loop."""

    def __init__(self, client: ServerClient, pool: ServerPool, config: ServerConfig) -> None:
        self._client, self._pool, self._config = client, pool, config
        self._group: WeightGroup | None = None

    @property
    def idle_command(self) -> str:
        """Wait until nothing is under way, what was aborted included, and forget the prefixes.

        With a request under way, new weights and the release of memory would end SGLang's scheduler: it asserts.
        """
        return f"flush_cache?timeout={self._config.update_timeout_seconds}"

    async def publish(self, buckets: Sequence[Bucket], dtype: torch.dtype, label: str) -> None:
        """Send them, in the servers' dtype, to every server that answers, those included that had left the rotation.

        Nothing may be under way. A server that fails is left out, and the others get everything anew. Without buckets
        only the label of the version changes, and nobody returns, as weights that were missed stay so. Raises
        RolloutError when none has taken it, or when this side fails: what the servers hold is unknown then.
        """
        try:
            await self._publish(buckets, dtype, label)
        except ServerLostError as error:
            raise RolloutError(f"the router did not take the servers back: {error}") from error
        except BaseException:
            await self._drop_group()  # Of no use after a transfer that broke off.
            raise

    async def _publish(self, buckets: Sequence[Bucket], dtype: torch.dtype, label: str) -> None:
        returning = await self._pool.returning() if buckets else []
        targets = {info.url: info for info in (*self._pool.servers, *returning)}
        while targets:
            problems = await self._attempt(tuple(targets.values()), buckets, dtype, label)
            if not problems:
                await self._pool.put_back([info for info in returning if info.url in targets])
                return
            guilty = _guilty(problems)
            await self._drop_group()
            await self._pool.take_out(guilty)
            targets = {url: info for url, info in targets.items() if url not in guilty}
        raise self._pool.error()

    async def command(self, path: str, content: Content) -> None:
        """Have every server in rotation do something; one that does not answer leaves the rotation.

        Raises RolloutError when one refuses, or none is left.
        """
        problems = await self._each(self._pool.servers, path, content)
        lost = {url: str(error) for url, error in problems.items() if isinstance(error, ServerLostError)}
        await self._pool.take_out(lost)
        for error in problems.values():
            if isinstance(error, RolloutError):
                raise error
        if not self._pool.servers:
            raise self._pool.error()

    async def close(self) -> None:
        """Take the group apart."""
        await self._drop_group()

    async def _attempt(
        self,
        targets: Sequence[ServerInfo],
        buckets: Sequence[Bucket],
        dtype: torch.dtype,
        label: str,
    ) -> Problems:
        if problems := await self._each(targets, self.idle_command, nothing):
            return problems
        if not buckets:
            return await self._each(targets, "update_weight_version", lambda _: {"new_version": label})
        if self._group is None or {s.url for s in self._group.servers} != {s.url for s in targets}:
            await self._drop_group()
            self._group = WeightGroup(
                self._client,
                targets,
                device=buckets[0][0][1].device,
                address=self._config.trainer_address,
                timeout_seconds=self._config.update_timeout_seconds,
            )
            if problems := await self._group.join():
                return problems
        sessions = [info for info in targets if info.has_sessions]
        if problems := await self._each(sessions, "begin_weight_update", nothing):
            return problems
        for index, bucket in enumerate(buckets):
            last = index == len(buckets) - 1
            cast = [(name, tensor.to(dtype)) for name, tensor in bucket]
            if problems := await self._group.send(cast, label=label if last else None):
                return problems
        return await self._each(sessions, "end_weight_update", nothing)

    async def _each(self, targets: Sequence[ServerInfo], command: str, content: Content) -> Problems:
        async def one(info: ServerInfo) -> RolloutError | ServerLostError | None:
            try:
                await self._client.post(
                    f"{info.url}/{command}",
                    content(info),
                    timeout_seconds=self._config.update_timeout_seconds,
                )
            except (RolloutError, ServerLostError) as error:
                return error
            return None

        found = await asyncio.gather(*map(one, targets))
        return {info.url: error for info, error in zip(targets, found, strict=True) if error is not None}

    async def _drop_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            await group.leave()


def _guilty(problems: Problems) -> dict[str, str]:
    """Servers that are gone, if any: what the others report then is only that the group broke."""
    lost = {url: str(error) for url, error in problems.items() if isinstance(error, ServerLostError)}
    return lost or {url: str(error) for url, error in problems.items()}
