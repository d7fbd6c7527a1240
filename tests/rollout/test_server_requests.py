"""What servers are sent, and the settings of it; no server is needed."""

import asyncio
import base64
import json
from dataclasses import replace

import pytest
import torch

from omnigrpo.feature_source import MediaConfig
from omnigrpo.rollout.config import RolloutConfig
from omnigrpo.rollout.interface import RolloutError
from omnigrpo.rollout.rows_text import rows_from_text, rows_to_text
from omnigrpo.rollout.serve import ServeConfig, serve_command, shown
from omnigrpo.rollout.server_config import ServerConfig, ServerMedia
from omnigrpo.rollout.server_requests import MediaSender
from omnigrpo.rollout.sglang_requests import MediaKeys
from omnigrpo.schema import Clip, Prefix


def media(prefix, mode: ServerMedia = "path", *, keys=None, version=0):
    sender = MediaSender(mode=mode, recipe=MediaConfig(), keys=keys or MediaKeys())
    return asyncio.run(sender.media(prefix, dtype=torch.float32, version=version))


@pytest.fixture
def prefix(builders, tmp_path):
    """Of a clip that exists, in name."""
    (tmp_path / "a.mp4").write_bytes(b"content")
    inputs = builders.inputs("a")
    prompt = replace(inputs.prompt, clip=Clip(path=tmp_path / "a.mp4", start_seconds=1.0))
    width = builders.CONFIG.decoder.width
    return Prefix(
        inputs=replace(inputs, prompt=prompt), embeddings_PD=torch.randn(len(inputs.token_ids_P), width)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_survive_json(dtype):
    rows = torch.randn(3, 5).to(dtype)
    again = rows_from_text(json.loads(json.dumps(rows_to_text(rows))))
    assert again.dtype is dtype
    assert torch.equal(again, rows)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "int8"}, "need a dtype"),
        ({"data": "!"}, "not base64"),
        ({"shape": [4, 5]}, "60 bytes for shape"),
    ],
)
def test_rows_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        rows_from_text(rows_to_text(torch.zeros(3, 5)) | changed)


def test_a_clip_goes_as_its_path_or_its_bytes(prefix):
    path = prefix.inputs.prompt.clip.path
    (entry,) = media(prefix)["video_data"]
    assert entry["path"] == str(path)
    assert entry["start_seconds"] == 1.0
    first, last = entry["offsets"][0]
    assert bool((prefix.inputs.token_ids_P[first : last + 1] < 0).all())
    (entry,) = media(prefix, "bytes")["video_data"]
    assert base64.b64decode(entry["base64"]) == b"content"
    json.dumps(entry)


def test_hashes_tell_clips_questions_and_versions_apart(prefix, tmp_path):
    def hashes(changed, version=0, mode: ServerMedia = "path"):
        entries = media(changed, mode, version=version)
        return entries["video_data"][0]["hash"], entries["audio_data"][0]["hash"]

    question = replace(prefix, inputs=replace(prefix.inputs, question_ids=torch.tensor([5])))
    (tmp_path / "b.mp4").write_bytes(b"content")
    prompt = replace(prefix.inputs.prompt, clip=Clip(path=tmp_path / "b.mp4", start_seconds=1.0))
    copied = replace(prefix, inputs=replace(prefix.inputs, prompt=prompt))
    assert hashes(prefix) == hashes(prefix)
    assert len({hashes(prefix), hashes(question), hashes(prefix, 1), hashes(copied)}) == 4
    assert hashes(prefix, mode="bytes") == hashes(copied, mode="bytes"), "equal content, equal prefix"


def test_a_missing_clip_is_named(prefix, tmp_path):
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(RolloutError, match=r"a\.mp4 cannot be sent"):
        media(prefix)


def test_serve_command_says_what_it_starts(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    command, environment = serve_command(
        ServeConfig(model=tmp_path, port=3, device="cpu", media="precomputed", more=("--log-level", "error"))
    )
    line = shown(command, environment)
    assert "SGLANG_VLM_CACHE_SIZE_MB=0" in line
    assert "--attention-backend torch_native" in line
    assert "omnigrpo_precomputed" in line
    assert line.endswith("--log-level error")
    assert "memory-saver" not in line
    saving, _ = serve_command(ServeConfig(model=tmp_path, port=3, memory_saver=True))
    assert {"--enable-memory-saver", "--enable-weights-cpu-backup"} <= set(saving)
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        serve_command(ServeConfig(model=tmp_path / "none", port=3))
    with pytest.raises(ValueError, match="media must be one of raw, precomputed"):
        ServeConfig(model=tmp_path, port=3, media="rows")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "servers"}, "rollout.servers is empty"),
        ({"servers": ("http://a:1",)}, "rollout.engine is native"),
        ({"engine": "servers", "servers": ("a:1",)}, "an address reads"),
    ],
)
def test_config_wants_servers_with_their_engine(settings, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"media": "pixels"}, "must be one of"),
        ({"attempts": 0}, "at least 1"),
        ({"watch_seconds": 0.0}, "above 0"),
    ],
)
def test_server_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        ServerConfig(**settings)
