"""A policy with prompts, and real servers of its checkpoint."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from omnigrpo.data.dataset import PromptStyle, read_dataset
from omnigrpo.group_sampler import embed
from omnigrpo.model.checkpoint_format import load_model, towers_hash
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.prompting import PromptEncoder, PromptTemplate
from omnigrpo.prefix_source import MediaConfig, PrefixSource
from omnigrpo.rollout.interface import GroupRequest, SamplingParams, collect
from omnigrpo.rollout.native_engine import NativeEngine
from omnigrpo.rollout.serve import ServeConfig, serve_command
from omnigrpo.rollout.sglang_plugin.names import COUNTERS_NAME
from omnigrpo.runtime.spans import SpanRecorder
from omnigrpo.schema import Completion, Prefix, PrefixInputs, SharedPrefixLayout
from omnigrpo.trainer import trained_weights
from omnigrpo_kernels.linear_logprob import linear_logprob

_START_SECONDS = 480.0


@dataclass(frozen=True, kw_only=True)
class Server:
    """One of SGLang's, with its own children."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def counters(self) -> list[int]:
        """Prefill calls, prefill rows, encoder calls."""
        return self.post("get_weights_by_name", {"name": COUNTERS_NAME})

    def post(self, path: str, content: dict[str, object]):
        """JSON in, JSON out."""
        request = urllib.request.Request(
            f"{self.url}/{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def get(self, path: str):
        """JSON out."""
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=60) as answer:
            return json.load(answer)

    def signal(self, number: int) -> None:
        """To all of its processes."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """At once, children included."""
        self.signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """If it is still there."""
        with contextlib.suppress(ProcessLookupError):
            self.kill()


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The model that is trained, and prompts with video and audio."""

    model: HumanOmni
    encoder: PromptEncoder
    source: PrefixSource
    inputs: tuple[PrefixInputs, ...]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """What a trainer publishes."""
        return trained_weights(self.model)

    def prefixes(self, count: int) -> list[Prefix]:
        """By the weights of now; the clips repeat beyond their number."""
        chosen = [self.inputs[i % len(self.inputs)] for i in range(count)]
        with torch.no_grad():
            return embed(self.model, chosen)

    def requests(self, count: int, samples: int = 3) -> list[GroupRequest]:
        """Groups of these prompts."""
        return [GroupRequest(prefix=p, seeds=tuple(range(samples))) for p in self.prefixes(count)]

    def greedy(self, **changed) -> SamplingParams:
        """Short."""
        settings = {"temperature": 0.0, "max_new_tokens": 12, "stop_token_ids": self.encoder.stop_token_ids}
        return SamplingParams(**(settings | changed))

    def natively(
        self, requests: list[GroupRequest], sampling: SamplingParams
    ) -> list[tuple[Completion, ...]]:
        """From the native engine."""
        return collect(NativeEngine(self.model).generate(requests, sampling), len(requests))

    def change(self) -> None:
        """As an update would: everything that trains."""
        with torch.no_grad():
            for _, weight in self.weights():
                weight.mul_(1.05)

    @torch.no_grad()
    def logprobs(self, prefix: Prefix, completion: Completion, temperature: float = 1.0) -> list[float]:
        """What the policy thinks of a completion's tokens."""
        ids, rows = torch.tensor(completion.token_ids), len(prefix.embeddings_PD)
        embeddings_TD = torch.cat([prefix.embeddings_PD, self.model.embed_tokens(ids)])
        layout = SharedPrefixLayout(prefix_lengths=(rows,), completion_lengths=((len(ids),),))
        hidden_TD = self.model.decoder(embeddings_TD, torch.arange(len(embeddings_TD)), layout)
        predictors_RD = hidden_TD[rows - 1 : rows - 1 + len(ids)]
        found = linear_logprob(predictors_RD, self.model.head_weight_VD, ids, temperature=temperature)
        return found.logprob_T.tolist()

    def largest_difference(self, requests: list[GroupRequest], groups: list[tuple[Completion, ...]]) -> float:
        """Between the log-probs of completions and the policy's."""
        return max(
            abs(theirs - ours)
            for request, group in zip(requests, groups, strict=True)
            for completion in group
            for theirs, ours in zip(
                completion.logprobs, self.logprobs(request.prefix, completion), strict=True
            )
        )


def load_policy(root: Path, dtype: torch.dtype = torch.float32) -> Policy:
    """The checkpoint that the servers started from."""
    loaded = load_model(root / "base", dtype=dtype)
    encoder = PromptEncoder(loaded.tokenizer, loaded.gate_tokenizer, loaded.model.config, PromptTemplate())
    source = PrefixSource(
        model=loaded.model,
        prompt_encoder=encoder,
        tower_hash=towers_hash(loaded.model),
        config=MediaConfig(prefetch_depth=0),
        spans=SpanRecorder(),
    )
    inputs = source.inputs(read_dataset(root / "data" / "rl.json", PromptStyle())[:6]).inputs
    return Policy(model=loaded.model, encoder=encoder, source=source, inputs=inputs)


def start_servers(directory: Path, logs: Path, *, count: int, **settings) -> tuple[Server, ...]:
    """Start them together, and wait until all answer."""
    started = tuple(_start(directory, logs, **settings) for _ in range(count))
    try:
        _wait_for(started)
    except BaseException:
        for server in started:
            server.end()
        raise
    return started


def _wait_for(started: tuple[Server, ...]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    waiting = list(started)
    while waiting:
        for server in list(waiting):
            assert server.process.poll() is None, server.log.read_text()[-3000:]
            with contextlib.suppress(OSError):
                server.get("model_info")
                waiting.remove(server)
        assert time.monotonic() < deadline, waiting[0].log.read_text()[-3000:]
        time.sleep(0.2)


def _start(directory: Path, logs: Path, **settings) -> Server:
    port = free_port()
    config = ServeConfig(
        model=directory,
        port=port,
        **({"device": "cpu", "dtype": "float32", "max_total_tokens": 16384} | settings),
    )
    command, environment = serve_command(config)
    log = logs / f"server-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | environment | {"OMP_NUM_THREADS": "1", "SGLANG_CPU_WORKERS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Server(url=f"http://127.0.0.1:{port}", process=process, log=log)


def free_port() -> int:
    """On this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
