import shutil
from pathlib import Path

import pytest
import torch

from omnigrpo.data.dataset import PromptStyle, read_dataset
from omnigrpo.model.checkpoint_format import load_model, towers_hash
from omnigrpo.model.prompting import PromptEncoder, PromptTemplate
from omnigrpo.prefix_source import MediaConfig, PrefixSource
from omnigrpo.runtime.spans import Phase, SpanRecorder
from omnigrpo.schema import ClipStatus


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


def test_prefetched_inputs_are_the_same_and_overlap(make_source, prompts):
    source, other = make_source(), make_source(prefetch=False)
    source.prefetch(prompts)
    assert same_features(source.inputs(prompts), other.inputs(prompts))
    assert source.num_decoded == 6
    assert f"overlapped/{Phase.DECODE}" in source._spans.drain()
    assert Phase.DECODE in other._spans.drain()


def test_a_prefetch_of_other_prompts_is_not_served(make_source, prompts):
    source = make_source()
    source.prefetch(prompts[:2])
    batch = source.inputs(prompts[3:5])
    assert [item.prompt.prompt_id for item in batch.inputs] == [p.prompt_id for p in prompts[3:5]]


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
