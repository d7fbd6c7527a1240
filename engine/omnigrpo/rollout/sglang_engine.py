"""Group rollouts on SGLang in this process: a group's prefix is sent once as rows, and prefilled once."""

import json
import shutil
from collections.abc import Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from omnigrpo.model.checkpoint_format import read_config
from omnigrpo.rollout import sglang_commands as commands
from omnigrpo.rollout.admission import Admission, Need
from omnigrpo.rollout.continued_prompts import check_prompt, check_stop_tokens
from omnigrpo.rollout.group_calls import counted, draw_group
from omnigrpo.rollout.interface import (
    GroupRequest,
    RolloutCounters,
    RolloutError,
    SamplingParams,
)
from omnigrpo.rollout.sglang_config import SGLangConfig
from omnigrpo.rollout.sglang_host import SGLangHost, check_installed
from omnigrpo.rollout.sglang_plugin.names import PRECOMPUTED_KEY
from omnigrpo.rollout.sglang_requests import (
    GenerateCall,
    Generated,
    MediaKeys,
    check_sharing,
    completion_of,
    media_bytes,
    media_of,
    missing_samples,
    prompt_ids,
    sampling_of,
)
from omnigrpo.rollout.sglang_stream import OpenCalls, SGLangStream, StreamOwner
from omnigrpo.rollout.sglang_weights import SGLangWeights
from omnigrpo.rollout.weight_buckets import WeightBuckets
from omnigrpo.schema import Completion

T = TypeVar("T")

_SHARED_MEMORY = Path("/dev/shm")
_CPU_ROWS = 1 << 16
"""Of a KV cache whose size nobody gave; a share of the memory would be allocated at once."""


class SGLangEngine:
    """SGLang's scheduler in child processes, with weights of its own; one call per group, all groups at once.

    It draws other tokens each time: SGLang 0.5.17 ignores the seeds of requests outside its deterministic mode, in
    which all samples of a call would be the same one. Log-probs are under softmax(logits / temperature) before top-k
    and top-p, at temperature 1 when decoding is greedy. Media rows come from the caller; no tower runs in there.
    """

    def __init__(
        self,
        directory: Path,
        config: SGLangConfig | None = None,
        *,
        device: Literal["cpu", "cuda"],
        dtype: torch.dtype,
    ) -> None:
        """Start SGLang on the checkpoint in ``directory``, whose weights are version 0; ``dtype`` is the policy's.

        Must be called in the main thread, below ``if __name__ == "__main__":`` in a script, as children are spawned.

        Raises ImportError without SGLang 0.5.17, RolloutError when it does not start.
        """
        check_installed()
        self._config = config or SGLangConfig()
        self._dtype = dtype if self._config.dtype == "policy" else getattr(torch, self._config.dtype)
        self._decoder = read_config(directory).decoder
        self._context = self._config.context_length or self._decoder.max_positions
        self._buckets = WeightBuckets(self._decoder, self._dtype, self._config.bucket_bytes)
        self._host = SGLangHost(
            _server_arguments(directory, self._config, self._context, device, self._dtype),
            _environment(device, self._config),
            start_timeout_seconds=self._config.start_timeout_seconds,
        )
        self._admission = Admission(
            Need(
                rows=self._host.capacity_rows,
                media_bytes=min(self._config.shared_memory_bytes, free_shared_memory() // 2),
            )
        )
        self._end_tokens = frozenset(commands.end_tokens(self._host.manager))
        self._keys = MediaKeys()
        self._weights = SGLangWeights(
            self._buckets,
            send=self._send_bucket,
            name_anew=lambda version: commands.set_version(self._host.manager, version),
            free_bytes=free_shared_memory if device == "cpu" else None,
        )
        self._paused = self._released = False
        self._counters = RolloutCounters()

    @property
    def counters(self) -> RolloutCounters:
        """Totals of finished groups; decoder calls are SGLang's own and not counted (``decode_steps`` stays 0)."""
        return self._counters

    @property
    def overlaps_training(self) -> bool:
        """True: its weights are its own."""
        return True

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Of SGLang's child processes."""
        return self._host.process_ids

    def generate(self, requests: Sequence[GroupRequest], sampling: SamplingParams) -> "SGLangStream":
        """Begin to draw the samples of every request; see ``Sampler.generate``.

        Raises RolloutError while memory is released, or when /dev/shm has no room for a group's media.
        """
        self._host.check()
        self._weights.check()
        if self._released:
            raise RolloutError("SGLang's memory is released: call restore_memory before generate")
        self._validate(requests, sampling)
        calls = OpenCalls(self._abort_call)
        futures = {
            self._host.submit(self._group(request, sampling, calls)): index
            for index, request in enumerate(requests)
        }
        owner = StreamOwner(
            timeout_seconds=self._config.timeout_seconds,
            is_paused=lambda: self._paused,
            error=self._host.error,
            abort=lambda: self._close_calls(calls),
        )
        return SGLangStream(futures, [request.name for request in requests], owner)

    def publish(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take the decoder's weights, once nothing is under way; those of towers, projectors and gate are left out.

        Raises RolloutError for a weight that the decoder lacks or of another shape (nothing has changed then), while
        it is paused with samples under way, when a bucket does not fit the shared memory, and when SGLang fails on
        the way. However it ends, once a bucket was sent nothing is generated until a ``publish`` has brought them all.
        """
        chosen = self._buckets.choose(weights)
        if self._paused and self._admission.num_inside:
            raise RolloutError(
                "samples are under way and the engine is paused, so that it will never be idle: resume it, or close "
                "the stream, before publish"
            )
        if self._released:
            self.restore_memory()
        self._run(self._update(chosen, version), what=f"take the weights of version {version}")

    def pause(self) -> None:
        """Stop drawing tokens; KV rows of what is under way stay."""
        if not self._paused:
            self._run(commands.pause(self._host.manager), what="pause")
            self._paused = True

    def resume(self) -> None:
        """Go on after ``pause``."""
        if self._paused:
            self._run(commands.resume(self._host.manager), what="go on")
            self._paused = False

    def release_memory(self) -> None:
        """Free weights and KV cache with ``sglang.memory_saver``, else only forget the prefixes.

        Without it the allocations stay: on a CPU there is nothing else. RolloutError while samples are under way.
        """
        if self._admission.num_inside:
            raise RolloutError(
                "samples are under way: read the stream to its end, or close it, before release_memory"
            )
        self._run(commands.flush_cache(self._host.manager), what="empty its cache")
        self._keys.clear()
        if self._config.memory_saver and not self._released:
            self._run(commands.release_memory(self._host.manager), what="release its memory")
            self._released = True

    def restore_memory(self) -> None:
        """Allocate again what ``release_memory`` freed; the weights come back from the host."""
        if self._released:
            self._run(commands.restore_memory(self._host.manager), what="restore its memory")
            self._released = False

    def server_counters(self) -> commands.ServerCounters:
        """What the model in SGLang's process has done."""
        return self._run(commands.server_counters(self._host.manager), what="read its counters")

    def close(self) -> None:
        """End SGLang's processes and remove their shared memory; may be called twice."""
        self._host.close()

    def _run(self, coroutine: Coroutine[Any, Any, T], *, what: str) -> T:
        return self._host.run(coroutine, what=what, timeout_seconds=self._config.timeout_seconds)

    async def _group(
        self, request: GroupRequest, sampling: SamplingParams, calls: OpenCalls
    ) -> tuple[Completion, ...]:
        """Draw what is missing of one group, unless its stream was closed, or the weights torn, while it waited."""
        begun = [request.begun_by(sample) for sample in range(len(request.seeds))]
        missing = missing_samples(request)
        done = {i: had for i, had in enumerate(begun) if had is not None and had.is_finished}
        if not missing:
            return tuple(done[i] for i in range(len(begun)))
        async with self._admission.hold(self._need(request, sampling)):
            calls.check()
            self._weights.check()
            drawn = await self._draw(request, sampling, missing, calls)
        for sample, generated in drawn.items():
            check_sharing(request, sample, generated)
            done[sample] = completion_of(generated, begun[sample], sampling)
        self._counters = counted(self._counters, request, drawn.values())
        return tuple(done[i] for i in range(len(begun)))

    async def _draw(
        self, request: GroupRequest, sampling: SamplingParams, missing: Sequence[int], calls: OpenCalls
    ) -> dict[int, Generated]:
        """By calls that end when ``calls`` is closed."""
        ids = prompt_ids(request.prefix)
        media = media_of(request.prefix, dtype=self._dtype, keys=self._keys, version=self._weights.version)

        async def call(tokens: tuple[int, ...], num_samples: int, room: int) -> list[Generated]:
            wanted = GenerateCall(
                token_ids=ids + tokens,
                media=media,
                num_samples=num_samples,
                sampling=sampling_of(sampling, room),
            )
            with calls.under_way(wanted.request_id):
                return await commands.generate(self._host.manager, wanted)

        return await draw_group(request, sampling, missing, call)

    async def _update(self, chosen: Sequence[tuple[str, Tensor]], version: int) -> None:
        """Send them while nothing is under way."""
        async with self._admission.alone():
            await self._weights.take(chosen, version)
            self._keys.clear()

    def _send_bucket(
        self, bucket: Sequence[tuple[str, Tensor]], version: int | None
    ) -> Coroutine[Any, Any, None]:
        return commands.update_weights(
            self._host.manager, bucket, ranks=self._config.tensor_parallel, version=version
        )

    def _abort_call(self, request_id: str) -> None:
        if self._host.is_running:  # Else nobody reads it, and the loop would wait for ever.
            commands.abort(self._host.manager, request_id)

    def _close_calls(self, calls: OpenCalls) -> None:
        async def close() -> None:
            calls.close()

        if self._host.is_running:
            self._run(close(), what="abort what is under way")

    def _need(self, request: GroupRequest, sampling: SamplingParams) -> Need:
        samples, rows = len(request.seeds), len(request.prefix.inputs.token_ids_P)
        return Need(
            rows=rows + samples * sampling.max_new_tokens,
            media_bytes=(samples + 1) * media_bytes(request.prefix, self._dtype),
        )

    def _validate(self, requests: Sequence[GroupRequest], sampling: SamplingParams) -> None:
        check_stop_tokens(sampling, self._decoder)
        hidden = self._end_tokens - set(sampling.stop_token_ids)
        if sampling.stop_token_ids and hidden:
            raise ValueError(
                f"stop_token_ids are {sampling.stop_token_ids}, but SGLang also ends a completion at the "
                f"checkpoint's own end tokens {sorted(hidden)}: add them"
            )
        free, cache = free_shared_memory(), self._host.capacity_rows
        limit = f"a context of {self._context} and a cache of {cache} rows"
        for request in requests:
            check_prompt(request, sampling, self._decoder, limit_rows=min(self._context, cache), limit=limit)
            needed = self._need(request, sampling).media_bytes
            if needed > free:
                raise RolloutError(
                    f"{request.name} needs {needed / 2**20:.1f} MiB of {_SHARED_MEMORY} to send its media rows once "
                    f"per sample, but {free / 2**20:.1f} MiB are free: enlarge it (docker: --shm-size), or draw "
                    "fewer samples per prompt"
                )


def free_shared_memory() -> int:
    """Bytes that processes may still put into shared memory."""
    return shutil.disk_usage(_SHARED_MEMORY).free


def _server_arguments(
    directory: Path, config: SGLangConfig, context: int, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """SGLang's ServerArgs."""
    arguments: dict[str, Any] = {
        "model_path": str(directory),
        "json_model_override_args": json.dumps({PRECOMPUTED_KEY: True}),
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "context_length": context,
        "mem_fraction_static": config.mem_fraction,
        "max_total_tokens": config.max_total_tokens or (_CPU_ROWS if device == "cpu" else None),
        "tp_size": config.tensor_parallel,
        "sampling_backend": "pytorch" if device == "cpu" else None,
        "grammar_backend": "none",
        "attention_backend": config.attention_backend or ("torch_native" if device == "cpu" else None),
        "weight_version": "0",
        "log_level": config.log_level,
    }
    if device == "cpu":
        # Without sleep_on_idle its scheduler keeps a core busy while there is nothing to do.
        arguments |= {"disable_cuda_graph": True, "disable_overlap_schedule": True, "sleep_on_idle": True}
    if config.memory_saver:
        arguments |= {"enable_memory_saver": True, "enable_weights_cpu_backup": True}
    return arguments


def _environment(device: str, config: SGLangConfig) -> dict[str, str]:
    """Variables of SGLang's processes: its cache of tower outputs has no part here, nor have libraries' warnings."""
    if device == "cpu" and torch.cuda.is_available():
        raise ValueError(
            "the rollout is to run on the CPU, but SGLang takes every CUDA device that torch sees: start this program "
            "with CUDA_VISIBLE_DEVICES= (empty), or set model.device=cuda"
        )
    threads = {} if config.threads is None else {"OMP_NUM_THREADS": str(config.threads)}
    quiet = (
        {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"} if config.log_level == "error" else {}
    )
    return {"SGLANG_VLM_CACHE_SIZE_MB": "0"} | threads | quiet
