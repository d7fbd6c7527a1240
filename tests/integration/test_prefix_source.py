import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch

from omnigrpo.data.dataset import PromptStyle, read_dataset
from omnigrpo.media.log_mel import whisper_log_mel
from omnigrpo.metrics import Metric
from omnigrpo.model.checkpoint_format import load_model, towers_hash
from omnigrpo.model.prompting import PromptEncoder, PromptTemplate
from omnigrpo.prefix_source import MediaConfig, PrefixSource
from omnigrpo.runtime.spans import Phase, SpanRecorder
from omnigrpo.schema import Clip, ClipStatus, Prompt


@pytest.fixture(scope="module")
def loaded(job):
    return load_model(job.base)


@pytest.fixture
def prompts(job, tmp_path):
    """Six prompts over clips that a test may damage."""
    shutil.copytree(job.data / "clips" / "heldout", tmp_path / "clips" / "heldout")
    shutil.copy(job.data / "heldout.json", tmp_path)
    return read_dataset(tmp_path / "heldout.json", PromptStyle())[:6]


@pytest.fixture
def make_source(loaded):
    sources = []

    def make(**settings) -> PrefixSource:
        encoder = PromptEncoder(
            loaded.tokenizer, loaded.gate_tokenizer, loaded.model.config, PromptTemplate()
        )
        source = PrefixSource(
            model=loaded.model,
            prompt_encoder=encoder,
            tower_hash=towers_hash(loaded.model),
            config=MediaConfig(**settings),
            spans=SpanRecorder(),
        )
        sources.append(source)
        return source

    yield make
    for source in sources:
        source.close()


def same_features(left, right) -> bool:
    return all(
        a.features.vision_FND.equal(b.features.vision_FND) and a.features.audio_AD.equal(b.features.audio_AD)
        for a, b in zip(left.inputs, right.inputs, strict=True)
    )


def test_every_clip_is_decoded_once(make_source, prompts):
    source = make_source()
    first = source.inputs(prompts[:4])
    assert source.num_decoded == 4
    again = source.inputs(prompts[:4])
    assert source.num_decoded == 4
    assert same_features(first, again)
    source.inputs(prompts[2:])
    assert source.num_decoded == 6


def in_pairs(prompts, order: Sequence[int] = range(100)):
    """Batches of two prompts: which pair each position has."""

    def batches(position: int):
        if position >= len(order):
            return ()
        return prompts[2 * order[position] : 2 * order[position] + 2]

    return batches


@pytest.mark.parametrize("kind", ["pipe", "device", "no path"])
def test_what_is_no_file_drops_its_prompt(make_source, prompts, tmp_path, kind):
    path = {"pipe": tmp_path / "pipe", "device": Path("/dev/zero"), "no path": Path("a\0b")}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    bad = replace(prompts[0], clip=Clip(path=path))
    batch = make_source(timeout_seconds=5).inputs([bad, prompts[1]])
    assert len(batch.inputs) == 1
    assert [dropped.status for dropped in batch.dropped] == [ClipStatus.UNREADABLE]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_what_is_read_ahead_is_the_same(make_source, prompts, depth):
    source, other = make_source(prefetch_depth=depth), make_source(prefetch_depth=0)
    batches = in_pairs(prompts)
    for position in range(3):
        assert same_features(source.read(batches, position), other.inputs(batches(position)))
    assert source.num_decoded == 6
    spans = source.features._spans.drain()
    assert (f"overlapped/{Phase.DECODE}" in spans) == (f"overlapped/{Phase.ENCODE}" in spans) == (depth > 0)
    assert (Phase.DECODE in spans) == (depth == 0)
    assert Phase.MEDIA_WAIT in spans


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_reading_begins_anywhere_and_another_sequence_begins_anew(make_source, prompts, depth):
    source = make_source(prefetch_depth=depth)
    forward, backward = in_pairs(prompts, (0, 1, 2)), in_pairs(prompts, (2, 1, 0))

    def names(batches, position):
        return [item.prompt.prompt_id for item in source.read(batches, position).inputs]

    ids = [prompt.prompt_id for prompt in prompts]
    assert names(forward, 2) == ids[4:]
    assert names(forward, 0) == ids[:2]
    assert names(backward, 0) == ids[4:]
    assert names(backward, 2) == ids[:2]
    assert names(forward, 1) == ids[2:4]


def test_a_clip_of_two_batches_under_way_is_decoded_once(make_source, prompts):
    source = make_source(prefetch_depth=4)
    batches = in_pairs(prompts, (0, 0, 1, 0, 1, 0))
    read = [source.read(batches, position) for position in range(6)]
    assert source.num_decoded == 4
    assert [batch.counts.decoded for batch in read] == [2, 0, 2, 0, 0, 0]
    assert [batch.counts.memory_hits for batch in read] == [0, 2, 0, 2, 2, 2]
    assert same_features(read[0], read[1])
    assert same_features(read[0], read[3])


def test_features_that_fit_nowhere_are_made_again(make_source, prompts):
    source, other = make_source(prefetch_depth=4, cache_budget_mib=0), make_source()
    batches = in_pairs(prompts, (0, 0, 1, 0))
    for position in range(4):
        batch = source.read(batches, position)
        assert same_features(batch, other.inputs(batches(position)))
        assert batch.counts.decoded == 2


def test_counts_say_where_clips_came_from(make_source, prompts, tmp_path):
    settings = {"cache_directory": tmp_path / "cache", "prefetch_depth": 2}
    first = make_source(**settings)
    batches = in_pairs(prompts, (0, 1, 0, 1))
    metrics = [first.read(batches, position).metrics for position in range(4)]
    assert [m[Metric.MEDIA_DECODED] for m in metrics] == [2, 2, 0, 0]
    assert [m[Metric.CACHE_MISSES] for m in metrics] == [2, 2, 0, 0]
    assert [m[Metric.CACHE_MEMORY_HITS] for m in metrics] == [0, 0, 2, 2]
    assert metrics[0][Metric.PREFETCH_STALLS] == 1
    assert metrics[0][Metric.PREFETCH_STALL_SECONDS] > 0
    assert all(m[Metric.PREFETCH_DEPTH] <= 2 for m in metrics)
    second = make_source(**settings)
    metrics = [second.read(batches, position).metrics for position in range(4)]
    assert [m[Metric.CACHE_DISK_HITS] for m in metrics] == [2, 2, 0, 0]
    assert [m[Metric.CACHE_MEMORY_HITS] for m in metrics] == [0, 0, 2, 2]
    assert second.num_decoded == 0


def test_an_error_is_raised_at_its_position(make_source, prompts):
    source = make_source(prefetch_depth=3)

    def batches(position: int):
        if position == 1:
            raise LookupError("no such batch")
        return prompts[:2]

    assert len(source.read(batches, 0).inputs) == 2
    with pytest.raises(LookupError, match="no such batch"):
        source.read(batches, 1)
    assert len(source.read(batches, 2).inputs) == 2


def test_close_does_not_wait_for_the_batches_ahead(make_source, job):
    prompts = read_dataset(job.data / "rl.json", PromptStyle())
    source = make_source(prefetch_depth=1, num_workers=1)
    source.read(lambda position: prompts[: 1 + 13 * position], 0)
    source.close()
    assert source.num_decoded < 14
    with pytest.raises(RuntimeError, match="closed"):
        source.read(lambda position: prompts[:1], 0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_settings_of_the_recipe_have_features_of_their_own(make_source, prompts, tmp_path):
    """Whoever changes how clips are read finds no features of the other way; other settings share them."""
    directory = tmp_path / "cache"
    make_source(cache_directory=directory).inputs(prompts[:1])
    for same in (
        {"num_workers": 1},
        {"timeout_seconds": 9.0},
        {"prefetch_depth": 0},
        {"cache_budget_mib": 1},
    ):
        source = make_source(cache_directory=directory, **same)
        source.inputs(prompts[:1])
        assert source.num_decoded == 0, same
    for other in ({"colour": "bt601"}, {"aspect": "stretch"}, {"min_frames": 1}):
        source = make_source(cache_directory=directory, **other)
        source.inputs(prompts[:1])
        assert source.num_decoded == 1, other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefetch_depth": -1}, "media.prefetch_depth must be at least 0, got -1"),
        ({"num_workers": 0}, "media.num_workers must be at least 1, got 0"),
        ({"timeout_seconds": 0.0}, "media.timeout_seconds must be above 0, got 0.0"),
        ({"cache_disk_budget_mib": -1}, "media.cache_disk_budget_mib must be at least 0, got -1"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        MediaConfig(**settings)


def test_the_disk_cache_outlives_the_source(make_source, prompts, tmp_path):
    before = make_source(cache_directory=tmp_path / "cache")
    first = before.inputs(prompts)
    after = make_source(cache_directory=tmp_path / "cache")
    assert same_features(first, after.inputs(prompts))
    assert after.num_decoded == 0


def test_a_changed_file_is_decoded_again(make_source, prompts):
    source = make_source()
    before = source.inputs(prompts[:1])
    shutil.copy(prompts[1].clip.path, prompts[0].clip.path)
    assert not same_features(before, source.inputs(prompts[:1]))
    assert source.num_decoded == 2


def test_unusable_clips_leave_the_others_alone(make_source, prompts):
    whole = make_source().inputs(prompts[2:])
    prompts[0].clip.path.unlink()
    prompts[1].clip.path.write_bytes(b"")
    source = make_source()
    batch = source.inputs(prompts)
    assert same_features(whole, batch)
    assert {d.prompt_id: d.status for d in batch.dropped} == {
        prompts[0].prompt_id: ClipStatus.MISSING,
        prompts[1].prompt_id: ClipStatus.UNREADABLE,
    }
    assert all(Path(prompts[i].clip.path).name in d.error for i, d in enumerate(batch.dropped))


def test_features_do_not_depend_on_the_batch(make_source, prompts):
    together = make_source().inputs(prompts)
    for index, prompt in enumerate(prompts):
        alone = make_source().inputs([prompt])
        assert torch.equal(alone.inputs[0].features.vision_FND, together.inputs[index].features.vision_FND)


def without_sound(source: Path, target: Path) -> None:
    """The same pictures in a file that has no sound stream."""
    with av.open(source) as found, av.open(target, "w") as written:
        stream = written.add_stream_from_template(found.streams.video[0])
        for packet in found.demux(found.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                written.mux(packet)


def mute_one(prompts: Sequence[Prompt], tmp_path: Path) -> Prompt:
    mute = tmp_path / "mute.mp4"
    without_sound(prompts[0].clip.path, mute)
    return replace(prompts[0], prompt_id="mute", clip=Clip(path=mute))


def test_a_clip_without_sound_is_dropped_or_heard_as_silence(make_source, loaded, prompts, tmp_path, caplog):
    asked = [mute_one(prompts, tmp_path), *prompts[:2]]
    dropping, silent = make_source(), make_source(audio_failure="silence")
    (lost,) = dropping.inputs(asked).dropped
    assert (lost.prompt_id, lost.status) == ("mute", ClipStatus.NO_AUDIO)

    batch = silent.inputs(asked)
    assert batch.dropped == ()
    mute, whole, _ = batch.inputs
    assert "mute.mp4" in caplog.text
    assert mute.features.vision_FND.equal(whole.features.vision_FND)
    config = loaded.model.config.audio
    mel_ML = whisper_log_mel(
        torch.zeros(160_000), num_mel_bins=config.num_mel_bins, chunk_seconds=config.chunk_seconds
    )
    (of_zeros,) = loaded.model.encode(None, mel_ML[None])
    assert mute.features.audio_AD.equal(of_zeros.audio_AD)
    assert same_features(make_source().inputs(prompts[:2]), replace(batch, inputs=batch.inputs[1:]))


def test_silence_is_no_cached_feature_of_a_run_that_drops(make_source, prompts, tmp_path):
    asked = [mute_one(prompts, tmp_path)]
    cache = tmp_path / "features"
    silent = make_source(audio_failure="silence", cache_directory=cache)
    assert len(silent.inputs(asked).inputs) == 1
    silent.close()
    assert len(make_source(cache_directory=cache).inputs(asked).dropped) == 1


def test_silence_does_not_stand_for_pictures(make_source, prompts, tmp_path):
    broken = replace(prompts[0], prompt_id="broken", clip=Clip(path=tmp_path / "absent.mp4"))
    sound = replace(mute_one(prompts, tmp_path), prompt_id="sound", modalities=("audio",))
    batch = make_source(audio_failure="silence").inputs([broken, sound])
    assert [(d.prompt_id, d.status) for d in batch.dropped] == [
        ("broken", ClipStatus.MISSING),
        ("sound", ClipStatus.NO_AUDIO),
    ]


def test_without_memory_every_step_decodes_again(make_source, prompts):
    kept, forgetful = make_source(), make_source(cache_budget_mib=0)
    for source in (kept, forgetful):
        first, second = source.inputs(prompts[:2]), source.inputs(prompts[:2])
        assert same_features(first, second)
    assert (kept.num_decoded, forgetful.num_decoded) == (2, 4)
