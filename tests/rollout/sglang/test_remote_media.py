"""A real server over HTTP that gets clips, and encodes them with the checkpoint's towers."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang_rig import group

from omnigrpo.data.dataset import PromptStyle, read_dataset
from omnigrpo.data.synthetic.dataset import SyntheticConfig, generate_dataset
from omnigrpo.feature_source import MediaConfig
from omnigrpo.group_sampler import embed
from omnigrpo.model.checkpoint_format import LoadedModel, load_model, towers_hash
from omnigrpo.model.prompting import PromptEncoder, PromptTemplate
from omnigrpo.prefix_source import PrefixSource
from omnigrpo.rollout.interface import SamplingParams, collect
from omnigrpo.rollout.native_engine import NativeEngine
from omnigrpo.rollout.sglang_plugin.media_entry import MediaRecipe, media_entries
from omnigrpo.rollout.sglang_plugin.names import COUNTERS_NAME
from omnigrpo.rollout.sglang_requests import prompt_ids, sampling_of
from omnigrpo.runtime.spans import SpanRecorder
from omnigrpo.schema import Modality, Prefix

SAMPLES = 3
ARGUMENTS = (
    "--device cpu --attention-backend torch_native --sampling-backend pytorch --disable-cuda-graph "
    "--disable-overlap-schedule --grammar-backend none --mem-fraction-static 0.5 --max-total-tokens 8192 "
    "--dtype float32 --skip-server-warmup --sleep-on-idle --log-level error"
)
"""Without its warm-up, which would send a picture to every multimodal model."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running one."""

    url: str

    def post(self, path: str, **content: object) -> Any:
        body = json.dumps(content).encode()
        request = urllib.request.Request(
            f"{self.url}{path}", data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read().decode()
        return json.loads(text) if text.startswith(("{", "[")) else text

    @property
    def encoder_calls(self) -> int:
        return self.post("/get_weights_by_name", name=COUNTERS_NAME)[2]


@pytest.fixture(scope="module")
def server(base) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(base), "--port", str(port)]
    process = subprocess.Popen([*command, *ARGUMENTS.split()], env=os.environ | {"OMP_NUM_THREADS": "1"})
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, "the server ended while it started"
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.5)
        yield Server(url=url)
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def loaded(base) -> LoadedModel:
    return load_model(base, dtype=torch.float32)


@pytest.fixture(scope="module")
def prefixes(loaded, tmp_path_factory) -> list[Prefix]:
    """Of real clips, as the trainer makes them: one with both modalities, one with each alone."""
    directory = tmp_path_factory.mktemp("clips")
    generate_dataset(directory, SyntheticConfig(num_cold_start=7, num_rl=7, num_heldout=7, num_ood=7))
    prompts = read_dataset(directory / "rl.json", PromptStyle(), media_root=None)[:3]
    modalities: tuple[tuple[Modality, ...], ...] = (("video", "audio"), ("video",), ("audio",))
    prompts = tuple(replace(p, modalities=m) for p, m in zip(prompts, modalities, strict=True))
    source = PrefixSource(
        model=loaded.model,
        prompt_encoder=PromptEncoder(
            loaded.tokenizer, loaded.gate_tokenizer, loaded.model.config, PromptTemplate()
        ),
        tower_hash=towers_hash(loaded.model),
        config=MediaConfig(prefetch_depth=0),
        spans=SpanRecorder(),
    )
    try:
        with torch.no_grad():
            return embed(loaded.model, source.read(lambda position: prompts, 0).inputs)
    finally:
        source.close()


@pytest.mark.parametrize("index", range(3), ids=["both", "video", "audio"])
@pytest.mark.parametrize("as_bytes", [False, True], ids=["path", "bytes"])
def test_clips_give_the_trainers_own_log_probs(server, loaded, prefixes, index, as_bytes):
    prefix = prefixes[index]
    sampling = SamplingParams(temperature=0.0, max_new_tokens=10)
    content = prefix.inputs.prompt.clip.path.read_bytes() if as_bytes else None
    entries = media_entries(prefix.inputs, MediaRecipe(), content=content)
    server.post("/flush_cache")
    before = server.encoder_calls

    outputs = server.post(
        "/generate",
        input_ids=list(prompt_ids(prefix)),
        sampling_params=sampling_of(sampling, 10) | {"n": SAMPLES},
        return_logprob=True,
        **{name: [items] for name, items in entries.items()},
    )

    assert server.encoder_calls - before == len(entries)
    (expected,) = collect(NativeEngine(loaded.model).generate([group(prefix, SAMPLES)], sampling), 1)
    assert len(outputs) == SAMPLES
    for output, sample in zip(outputs, expected, strict=True):
        assert output["output_ids"] == list(sample.token_ids)
        logprobs = [entry[0] for entry in output["meta_info"]["output_token_logprobs"]]
        assert logprobs == pytest.approx(sample.logprobs, rel=0, abs=1e-4)
        assert output["meta_info"]["cached_tokens"] == len(prefix.embeddings_PD) - 1


def test_a_clip_that_cannot_be_used_is_refused_and_the_server_goes_on(server, prefixes):
    prefix = prefixes[0]
    entries = media_entries(prefix.inputs, MediaRecipe())
    entries["video_data"][0]["path"] = str(Path("/nowhere.mp4"))
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post(
            "/generate", input_ids=list(prompt_ids(prefix)), sampling_params={"max_new_tokens": 2}, **entries
        )
    assert "cannot be used (missing)" in refused.value.read().decode()
    assert server.post("/generate", input_ids=[5, 6], sampling_params={"max_new_tokens": 2})["output_ids"]
