"""Group rollouts on any number of SGLang servers over HTTP, each group on one of them."""

import asyncio
import concurrent.futures
import logging
import uuid
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from omnigrpo.feature_source import MediaConfig
from omnigrpo.model.config import HumanOmniConfig
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.parts import TOWER_PARTS, part_of
from omnigrpo.rollout.admission import Admission, Need
from omnigrpo.rollout.continued_prompts import INPUT_KEPT_BACK, check_prompt, check_stop_tokens
from omnigrpo.rollout.group_calls import counted, draw_group
from omnigrpo.rollout.interface import (
    GroupRequest,
    RolloutCounters,
    RolloutError,
    SamplingParams,
)
from omnigrpo.rollout.loop_thread import LoopThread
from omnigrpo.rollout.router_process import ROUTING_KEY
from omnigrpo.rollout.server_client import ServerClient, ServerLostError
from omnigrpo.rollout.server_config import ServerConfig, check_servers
from omnigrpo.rollout.server_pool import ServerPool
from omnigrpo.rollout.server_probe import UNPUBLISHED, ServerInfo
from omnigrpo.rollout.server_requests import MediaSender, generate_body
from omnigrpo.rollout.sglang_requests import (
    GenerateCall,
    Generated,
    MediaKeys,
    OtherWeightsError,
    check_sharing,
    completion_of,
    missing_samples,
    prompt_ids,
    sampling_of,
    version_label,
)
from omnigrpo.rollout.sglang_stream import SGLangStream, StreamOwner
from omnigrpo.rollout.weight_buckets import WeightBuckets
from omnigrpo.rollout.weight_publisher import Content, WeightPublisher, memory_tags, nothing
from omnigrpo.schema import Completion

T = TypeVar("T")

_log = logging.getLogger(__name__)


class ServerEngine:
    """SGLang servers with weights of their own, behind SGLang's router, which this engine starts.

    One request per group, so that its samples share one prefix on one server. A group whose server is lost is drawn
    anew on another one; a server that is lost, or does not take new weights, leaves the rotation, and returns with the
    next weights once it answers again. The servers draw other tokens each time: seeds have no effect on them. Log-probs
    are under softmax(logits / temperature) before top-k and top-p, at temperature 1 when decoding is greedy.
    """

    def __init__(
        self,
        servers: Sequence[str],
        config: ServerConfig | None = None,
        *,
        model: HumanOmniConfig,
        media: MediaConfig | None = None,
    ) -> None:
        """Ask all servers and start the router; the weights that the servers hold must be those of the checkpoint.

        Raises ValueError for bad addresses, ImportError without sglang-router, RolloutError that names each server
        which does not answer, holds another model, or was started for another ``server.media``.
        """
        check_servers(tuple(servers))
        self._config = config or ServerConfig()
        self._model = model
        self._keys = MediaKeys()
        self._sender = MediaSender(mode=self._config.media, recipe=media or MediaConfig(), keys=self._keys)
        self._run = uuid.uuid4().hex[:8]
        """In the labels of versions, so that no server passes which was started anew or has another run's weights."""
        self._version: int | None = None
        """Of the weights that all servers in rotation hold; None when that is not known."""
        self._paused = self._released = False
        self._under_way = 0
        self._counters = RolloutCounters()
        self._loop = LoopThread("rollout-servers")
        try:
            self._loop.run(self._open(servers))
        except BaseException:
            self.close()
            raise

    @property
    def counters(self) -> RolloutCounters:
        """Totals of finished groups; decoder calls are SGLang's own and not counted (``decode_steps`` stays 0)."""
        return self._counters

    @property
    def overlaps_training(self) -> bool:
        """True: the servers have weights of their own."""
        return True

    @property
    def servers(self) -> tuple[str, ...]:
        """Addresses of the servers in rotation."""
        return tuple(info.url for info in self._pool.servers)

    @property
    def router_process_id(self) -> int:
        """Of the router that this engine started."""
        return self._pool.router.process_id

    def generate(self, requests: Sequence[GroupRequest], sampling: SamplingParams) -> SGLangStream:
        """Begin to draw the samples of every request; see ``Sampler.generate``."""
        if self._version is None:
            raise _unknown_weights()
        if self._released:
            raise RolloutError("the servers' memory is released: call restore_memory before generate")
        if not self._pool.servers:
            raise self._pool.error()
        self._validate(requests, sampling)
        futures = {
            self._loop.submit(self._group(request, sampling)): index for index, request in enumerate(requests)
        }
        owner = StreamOwner(
            timeout_seconds=self._config.timeout_seconds,
            is_paused=lambda: self._paused,
            error=lambda: RolloutError("this rollout engine was closed while samples were under way"),
            abort=lambda: _cancel(futures),
        )
        return SGLangStream(futures, [request.name for request in requests], owner)

    def publish(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send what the servers hold of these, once nothing is under way; towers stay as they are.

        Raises RolloutError for a weight that does not fit (nothing has changed then), while paused with samples under
        way, when no server has taken them all, and when this side fails: then nothing is generated until a ``publish``
        has brought them all.
        """
        chosen = self._buckets.choose(weights)
        if self._paused and self._admission.num_inside:
            raise RolloutError(
                "samples are under way and the servers are paused, so that they will never be idle: resume them, or "
                "close the stream, before publish"
            )
        if self._released:
            self.restore_memory()
        self._loop.run(self._publish(chosen, version))

    def pause(self) -> None:
        """Stop drawing tokens; KV rows of what is under way stay."""
        self._command("pause_generation", lambda _: {"mode": "in_place"})
        self._paused = True

    def resume(self) -> None:
        """Go on after ``pause``."""
        self._command("continue_generation", nothing)
        self._paused = False

    def release_memory(self) -> None:
        """Free what servers that were started with ``omnigrpo serve --memory-saver`` can restore: KV cache and weights.

        With SGLang's ``--enable-memory-saver`` alone it is the KV cache, and without it nothing.
        Raises RolloutError while samples are under way.
        """
        if self._admission.num_inside:
            raise RolloutError(
                "samples are under way: read the stream to its end, or close it, before release_memory"
            )
        if not self._released:
            self._command(self._publisher.idle_command, nothing)
            self._command("release_memory_occupation", memory_tags)
            self._released = True

    def restore_memory(self) -> None:
        """Allocate again what ``release_memory`` freed."""
        if self._released:
            self._command("resume_memory_occupation", memory_tags)
            self._released = False

    def close(self) -> None:
        """End the router; the servers go on as they are. May be called twice."""
        if self._loop.is_closed:
            return
        self._loop.run(self._close())
        self._loop.close()

    async def _open(self, servers: Sequence[str]) -> None:
        self._client = ServerClient()
        decoder = self._model.decoder
        self._pool = ServerPool(self._client, servers, decoder, self._config)
        self._publisher = WeightPublisher(self._client, self._pool, self._config)
        self._watching = asyncio.Lock()  # A look draws a token, which must not meet new weights.
        self._admission = Admission(Need(rows=self._config.max_samples, media_bytes=0))
        await self._pool.open()
        infos = self._pool.servers
        dtypes = {info.dtype for info in infos}
        if len(dtypes) > 1:
            raise RolloutError(f"the servers compute in different dtypes: {_by_server(infos, 'dtype')}")
        self._dtype = dtypes.pop()
        self._buckets = WeightBuckets(
            decoder, self._dtype, self._config.bucket_mib << 20, others=self._shapes_beside_decoder()
        )
        if all(info.version in (UNPUBLISHED, "0") for info in infos):
            await self._publisher.publish([], self._dtype, self._label(0))
            self._version = 0
        self._watcher = asyncio.ensure_future(self._watch())

    async def _close(self) -> None:
        await self._publisher.close()
        self._pool.close()
        await self._client.close()

    async def _watch(self) -> None:
        failures: dict[str, int] = {}
        while True:
            await asyncio.sleep(self._config.watch_seconds)
            async with self._watching:
                if self._under_way and not self._paused:
                    await self._look(failures)

    async def _look(self, failures: dict[str, int]) -> None:
        """One look at every server; what goes wrong with it is told, and the next one comes."""
        try:
            await self._pool.watch(failures)
        except (RolloutError, ServerLostError) as error:
            _log.warning("the rollout servers could not be looked after: %s", error)

    async def _group(self, request: GroupRequest, sampling: SamplingParams) -> tuple[Completion, ...]:
        """Draw what is missing of one group, on another server when its own is lost."""
        done = {i: had for i in range(len(request.seeds)) if (had := request.begun_by(i)) is not None}
        missing = missing_samples(request)
        if missing:
            async with self._admission.hold(Need(rows=len(missing), media_bytes=0)):
                self._under_way += 1
                try:
                    drawn = await self._draw_somewhere(request, sampling, missing)
                finally:
                    self._under_way -= 1
            for sample, generated in drawn.items():
                done[sample] = completion_of(generated, request.begun_by(sample), sampling)
            self._counters = counted(self._counters, request, drawn.values())
        return tuple(done[i] for i in range(len(request.seeds)))

    async def _draw_somewhere(
        self, request: GroupRequest, sampling: SamplingParams, missing: Sequence[int]
    ) -> dict[int, Generated]:
        """All the missing samples from one server: what an attempt that failed had drawn is forgotten."""
        problem: Exception | None = None
        if (version := self._version) is None:
            raise _unknown_weights()
        for _ in range(self._config.attempts):
            if not self._pool.servers:
                raise self._pool.error()
            try:
                drawn = await self._draw(request, sampling, missing, version)
                _check_stops(request, sampling, drawn.values())
                for sample, generated in drawn.items():
                    check_sharing(request, sample, generated)
                if all(generated.version == version for generated in drawn.values()):
                    return drawn
                problem = OtherWeightsError(
                    f"{request.name} was drawn by weights other than version {version}"
                )
            except (ServerLostError, OtherWeightsError) as error:
                problem = error
            await self._pool.check(self._label(version))
        raise RolloutError(
            f"{request.name} could not be drawn in {self._config.attempts} attempts, the last of which ended so: "
            f"{problem}"
        ) from problem

    async def _draw(
        self, request: GroupRequest, sampling: SamplingParams, missing: Sequence[int], version: int
    ) -> dict[int, Generated]:
        """Draw them by calls that the router sends to one server."""
        ids, route = prompt_ids(request.prefix), uuid.uuid4().hex
        media = await self._sender.media(request.prefix, dtype=self._dtype, version=version)

        async def draw(tokens: tuple[int, ...], num_samples: int, room: int) -> list[Generated]:
            call = GenerateCall(
                token_ids=ids + tokens,
                media=media,
                num_samples=num_samples,
                sampling=sampling_of(sampling, room),
            )
            answer = await self._unless_hung(
                self._client.post(
                    f"{self._pool.router.url}/generate",
                    generate_body(call),
                    headers={ROUTING_KEY: route},
                    timeout_seconds=None,
                )
            )
            return [
                Generated.from_output(o, run=self._run) for o in (answer if num_samples > 1 else [answer])
            ]

        return await draw_group(request, sampling, missing, draw)

    async def _unless_hung(self, call: Coroutine[Any, Any, T]) -> T:
        """Its result; ServerLostError as soon as a server is given up that may hold it for ever."""
        task, hung = asyncio.ensure_future(call), asyncio.ensure_future(self._pool.hung.wait())
        try:
            await asyncio.wait({task, hung}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise ServerLostError("a server stopped answering while samples were under way")
        finally:
            task.cancel()
            hung.cancel()

    async def _publish(self, chosen: Sequence[tuple[str, Tensor]], version: int) -> None:
        async with self._admission.alone(), self._watching:
            held, self._version = self._version, None
            if not chosen:
                if held is None:
                    raise _unknown_weights()
                await self._pool.check(self._label(held))  # One that was started anew would pass from now on.
            await self._publisher.publish(list(self._buckets.plan(chosen)), self._dtype, self._label(version))
            self._version = version
            self._keys.clear()

    def _label(self, version: int) -> str:
        return version_label(version, run=self._run)

    def _command(self, path: str, content: Content) -> None:
        """Have every server in rotation do it; one that is gone leaves the rotation."""
        self._loop.run(self._publisher.command(path, content))

    def _shapes_beside_decoder(self) -> dict[str, tuple[int, ...]]:
        """What trains outside the decoder, where the servers have it: projectors, gate and BERT, not the towers."""
        if self._config.media == "rows":
            return {}
        with torch.device("meta"):
            named = HumanOmni(self._model).named_parameters()
        parts = {name: (part_of(name), tuple(parameter.shape)) for name, parameter in named}
        return {name: shape for name, (part, shape) in parts.items() if part not in (*TOWER_PARTS, "llm")}

    def _validate(self, requests: Sequence[GroupRequest], sampling: SamplingParams) -> None:
        decoder = self._model.decoder
        check_stop_tokens(sampling, decoder)
        rows = min(info.input_rows for info in self._pool.servers) + INPUT_KEPT_BACK
        for request in requests:
            check_prompt(request, sampling, decoder, limit_rows=rows, limit=f"the {rows} rows of a server")


def _unknown_weights() -> RolloutError:
    return RolloutError(
        "the rollout servers hold weights of an earlier run, or of a publication that broke off: publish all of the "
        "policy's before generate"
    )


def _check_stops(request: GroupRequest, sampling: SamplingParams, drawn: Iterable[Generated]) -> None:
    """Raise RolloutError for a sample that ended at a token which was not asked for."""
    for generated in drawn:
        if generated.finish == "stop" and generated.matched not in sampling.stop_token_ids:
            raise RolloutError(
                f"a server ended a sample of {request.name} at {generated.matched!r}, an end token of its checkpoint "
                f"that stop_token_ids {sampling.stop_token_ids} lacks: add it"
            )


def _cancel(futures: Iterable[concurrent.futures.Future[Any]]) -> None:
    """The servers abort a request whose connection is closed."""
    for future in futures:
        future.cancel()


def _by_server(infos: Iterable[ServerInfo], name: str) -> str:
    return ", ".join(f"{info.url}: {getattr(info, name)}" for info in infos)
