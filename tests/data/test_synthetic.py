"""The generator: what keeps the modalities apart, determinism, and the files it writes."""

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from omnigrpo.data.dataset import PromptStyle, read_dataset
from omnigrpo.data.synthetic.attributes import (
    EXPRESSION_HIGH,
    EXPRESSION_LOW,
    PROSODY_HIGH,
    PROSODY_LOW,
    Expression,
    Prosody,
    sample_expression,
    vector,
)
from omnigrpo.data.synthetic.clip import SPLITS, Difficulty, Split, render_clip
from omnigrpo.data.synthetic.dataset import (
    Annotator,
    DatasetManifest,
    SyntheticConfig,
    generate_dataset,
    labels_of,
    vocabulary_texts,
)
from omnigrpo.data.synthetic.emotions import (
    AUDIO_ONLY_PAIRS,
    CELLS,
    LABELS,
    VIDEO_ONLY_PAIRS,
    Face,
    labels_with_face,
    single_modality_bound,
)
from omnigrpo.data.synthetic.identity import (
    BACKGROUNDS,
    sample_face_identity,
    sample_scene,
    sample_voice_identity,
)
from omnigrpo.data.synthetic.reasoning import HUMAN_TURN, WORDS, describe, reasoning
from omnigrpo.data.synthetic.voice import SAMPLE_RATE_HZ, sing

TINY = SyntheticConfig(seed=3, num_cold_start=7, num_rl=7, num_heldout=7, num_ood=7, size=64)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetManifest:
    return generate_dataset(tmp_path_factory.mktemp("synthetic"), TINY, num_workers=0)


def test_every_emotion_has_its_own_cell_in_a_chain_of_shared_faces_and_voices() -> None:
    assert set(CELLS) == set(LABELS)
    assert len(set(CELLS.values())) == len(LABELS)
    assert set(AUDIO_ONLY_PAIRS) == {("surprise", "fear"), ("neutral", "sad"), ("angry", "disgust")}
    assert set(VIDEO_ONLY_PAIRS) == {("happy", "surprise"), ("neutral", "disgust"), ("sad", "fear")}


@pytest.mark.parametrize("modality", [0, 1], ids=["face", "voice"])
def test_no_classifier_of_one_modality_passes_four_sevenths(modality: int) -> None:
    categories = Counter(cell[modality] for cell in CELLS.values())
    # For each category the best constant answer is right for one of its equally likely emotions.
    best = sum(Fraction(size, len(CELLS)) * Fraction(1, size) for size in categories.values())
    assert best == Fraction(4, 7)
    assert single_modality_bound(modality) == pytest.approx(4 / 7)


@pytest.mark.parametrize("pair", AUDIO_ONLY_PAIRS, ids="-".join)
def test_emotions_with_one_face_are_drawn_bit_equal(pair: tuple[str, str]) -> None:
    first, second = (_clip(label) for label in pair)
    np.testing.assert_array_equal(first.face.frames_FHWC, second.face.frames_FHWC)
    assert first.face.expression == second.face.expression
    assert not np.array_equal(first.voice.waveform, second.voice.waveform)


@pytest.mark.parametrize("pair", VIDEO_ONLY_PAIRS, ids="-".join)
def test_emotions_with_one_voice_are_sung_bit_equal(pair: tuple[str, str]) -> None:
    first, second = (_clip(label) for label in pair)
    np.testing.assert_array_equal(first.voice.waveform, second.voice.waveform)
    assert first.voice.prosody == second.voice.prosody
    assert not np.array_equal(first.face.frames_FHWC, second.face.frames_FHWC)


def test_a_clip_depends_on_seed_split_and_index_only() -> None:
    again, other_index = _clip("happy"), _clip("happy", index=1)
    other_split, other_seed = _clip("happy", split="heldout"), _clip("happy", seed=1)
    clip = _clip("happy")
    np.testing.assert_array_equal(clip.face.frames_FHWC, again.face.frames_FHWC)
    np.testing.assert_array_equal(clip.voice.waveform, again.voice.waveform)
    for other in (other_index, other_split, other_seed):
        assert other.face.identity != clip.face.identity
        assert other.voice.identity != clip.voice.identity
        assert other.attributes() != clip.attributes()


def test_clips_are_one_and_a_half_to_two_and_a_half_seconds_and_equally_long_in_both_modalities() -> None:
    for index in range(12):
        clip = _clip("fear", index=index)
        seconds = len(clip.face.frames_FHWC) / 12
        assert 1.5 <= seconds <= 2.5
        assert len(clip.voice.waveform) == pytest.approx(seconds * SAMPLE_RATE_HZ, abs=80)
        assert np.abs(clip.voice.waveform).max() < 1.0


def test_ood_people_voices_and_backgrounds_lie_outside_the_training_ranges() -> None:
    rng = np.random.default_rng(0)
    people, strangers = ([sample_face_identity(domain, rng) for _ in range(200)] for domain in ("in", "ood"))
    assert max(person.aspect for person in people) < min(person.aspect for person in strangers)
    assert all(person.skin[0] > person.skin[2] for person in people)
    assert all(person.skin[0] < max(person.skin[1:]) for person in strangers)
    scenes = {
        domain: {BACKGROUNDS[sample_scene(domain, rng, occlusion=0).background] for _ in range(200)}
        for domain in ("in", "ood")
    }
    assert scenes == {"in": {"gradient", "stripes", "blobs"}, "ood": {"checks", "rings"}}
    speakers, others = ([sample_voice_identity(domain, rng) for _ in range(200)] for domain in ("in", "ood"))
    low, high = min(s.base_hz for s in speakers), max(s.base_hz for s in speakers)
    assert all(not low <= other.base_hz <= high for other in others)
    assert any(other.base_hz < low for other in others)
    assert any(other.base_hz > high for other in others)


def test_attributes_stay_in_their_ranges_under_any_jitter() -> None:
    rng = np.random.default_rng(0)
    for face in Face:
        for _ in range(50):
            values = vector(sample_expression(face, rng, intensity_low=0.0, jitter=2.0))
            assert np.all(values >= vector(EXPRESSION_LOW) - 1e-6)
            assert np.all(values <= vector(EXPRESSION_HIGH) + 1e-6)


def test_mouth_opening_is_drawn_where_the_mouth_is() -> None:
    closed, opened = (_clip("surprise", jitter=0.0), _clip("surprise", jitter=0.0, intensity=1.15))
    assert opened.face.expression.mouth_open >= closed.face.expression.mouth_open
    difference = np.abs(
        _clip("neutral").face.frames_FHWC[-1].astype(int) - _clip("surprise").face.frames_FHWC[-1]
    )
    rows = difference.sum(axis=(1, 2))
    assert rows[: len(rows) // 8].sum() == 0


@pytest.mark.parametrize(
    ("attribute", "measure"),
    [
        ("pitch", lambda wave: _centroid(wave, 60, 500)),
        ("energy", lambda wave: float(np.sqrt(np.mean(wave**2)))),
        ("tremor", lambda wave: _flutter(wave)),
    ],
    ids=["pitch raises the fundamental", "energy raises the level", "tremor modulates the level"],
)
def test_an_attribute_changes_the_sound_as_it_says(attribute: str, measure) -> None:
    middle = Prosody(pitch=0.0, contour=0.0, energy=0.5, tempo=0.5, tremor=0.0)
    low, high = getattr(PROSODY_LOW, attribute), getattr(PROSODY_HIGH, attribute)
    heard = []
    for value in (low, high):
        rng = np.random.default_rng(5)
        identity = sample_voice_identity("in", rng)
        heard.append(
            measure(sing(replace(middle, **{attribute: value}), identity, duration_seconds=2.0, rng=rng))
        )
    assert heard[1] > 1.15 * heard[0]


def test_files_are_h264_and_aac_and_decode(dataset: DatasetManifest) -> None:
    for split in SPLITS:
        item = json.loads(dataset.json_path(split).read_text())[0]
        with av.open(str(dataset.directory / item["video"])) as container:
            video, audio = container.streams.video[0], container.streams.audio[0]
            assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
            assert (video.codec_context.pix_fmt, video.width, video.height) == ("yuv420p", 64, 64)
            assert (audio.sample_rate, audio.channels) == (SAMPLE_RATE_HZ, 1)
            assert sum(1 for _ in container.decode(video)) == video.frames
        with av.open(str(dataset.directory / item["video"])) as container:
            assert sum(frame.samples for frame in container.decode(audio=0)) > SAMPLE_RATE_HZ


def test_decoded_pictures_are_the_drawn_ones(dataset: DatasetManifest) -> None:
    label = labels_of(TINY, "rl")[0]
    clip = render_clip(label, seed=3, split="rl", index=0, difficulty=TINY.difficulty, size=64)
    with av.open(str(dataset.directory / "clips/rl/00000.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == clip.face.frames_FHWC.shape
    error = np.abs(frames.astype(np.float32) - clip.face.frames_FHWC).mean()
    assert error < 10, f"mean error {error:.1f} of 255 levels"


def test_json_is_r1_omnis(dataset: DatasetManifest) -> None:
    for split in SPLITS:
        items = json.loads(dataset.json_path(split).read_text())
        solutions = [prompt.solution for prompt in read_dataset(dataset.json_path(split), PromptStyle())]
        assert len(items) == len(solutions) == 7
        assert set(solutions) <= set(LABELS)
        assert split == "cold_start" or Counter(solutions) == Counter(LABELS)
        for item in items:
            assert set(item) == {"video", "conversations"}
            assert [turn["from"] for turn in item["conversations"]] == ["human", "gpt"]
            assert item["conversations"][0]["value"] == HUMAN_TURN
            assert (dataset.directory / item["video"]).is_file()
            answer = item["conversations"][1]["value"]
            if split == "cold_start":
                assert answer.startswith("<think>")
                assert "</think>\n<answer>" in answer
            else:
                assert answer in LABELS


@pytest.mark.parametrize("annotator", ["face", "both"])
def test_cold_start_texts_agree_with_what_was_drawn_and_sung(annotator: Annotator, tmp_path: Path) -> None:
    config = replace(TINY, num_cold_start=28, num_rl=0, num_heldout=0, num_ood=0, annotator=annotator)
    dataset = generate_dataset(tmp_path, config, num_workers=0)
    attributes = json.loads(dataset.attributes_path.read_text())
    concluded = []
    for item in json.loads(dataset.json_path("cold_start").read_text()):
        made, answer = attributes[item["video"]], item["conversations"][1]["value"]
        thought, _, label = (
            answer.removeprefix("<think>").removesuffix("</answer>").partition("</think>\n<answer>")
        )
        assert 18 <= len(thought.split()) <= 45
        for name in WORDS:
            assert describe(name, made[name]) in thought
        assert label in thought
        assert (made["face"], made["voice"]) == CELLS[made["label"]]
        assert label in (labels_with_face(made["label"]) if annotator == "face" else (made["label"],))
        concluded.append(label == made["label"])
    assert all(concluded) == (annotator == "both")


def test_reasoning_words_follow_the_values() -> None:
    low = reasoning(EXPRESSION_LOW, PROSODY_LOW, "sad", np.random.default_rng(0))
    high = reasoning(EXPRESSION_HIGH, PROSODY_HIGH, "happy", np.random.default_rng(0))
    for name, words in WORDS.items():
        assert words[0][1] in low, name
        assert words[-1][1] in high, name
    assert set(WORDS) <= set(Expression.__slots__) | set(Prosody.__slots__)


def test_vocabulary_texts_hold_every_word_and_are_always_the_same() -> None:
    texts = vocabulary_texts()
    assert texts == vocabulary_texts()
    everything = "\n".join(texts)
    assert all(word in everything for words in WORDS.values() for _, word in words)
    assert all(f"<answer>{label}</answer>" in everything for label in LABELS)
    assert len(set(everything.replace("<", " <").split())) < 150


def test_two_processes_write_the_same_bytes_as_one(dataset: DatasetManifest, tmp_path: Path) -> None:
    generate_dataset(tmp_path, TINY, num_workers=2)
    for path in sorted(dataset.directory.rglob("*.*")):
        assert (tmp_path / path.relative_to(dataset.directory)).read_bytes() == path.read_bytes(), path.name


def test_an_equal_dataset_is_reused_and_another_one_refused(dataset: DatasetManifest) -> None:
    before = (dataset.directory / "clips/rl/00000.mp4").stat().st_mtime_ns
    assert generate_dataset(dataset.directory, TINY).reused
    assert (dataset.directory / "clips/rl/00000.mp4").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="another configuration"):
        generate_dataset(dataset.directory, replace(TINY, seed=4))


def test_labels_are_balanced_and_shuffled() -> None:
    config = SyntheticConfig()
    for split in SPLITS:
        labels = labels_of(config, split)
        assert set(Counter(labels).values()) == {config.num_clips(split) // 7}
    assert labels_of(config, "heldout") != labels_of(config, "ood")
    first = Counter(labels_of(config, "rl")[:105])
    assert set(first) == set(LABELS)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"size": 65}, "size must be even"), ({"num_rl": -1}, "num_rl must be at least 0, got -1")],
    ids=["odd side", "negative count"],
)
def test_impossible_configurations_say_why(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SyntheticConfig(), **change)


def _clip(
    label: str,
    *,
    seed: int = 0,
    split: Split = "rl",
    index: int = 0,
    jitter: float = 0.15,
    intensity: float = 0.7,
):
    difficulty = Difficulty(expression_jitter=jitter, prosody_jitter=jitter, intensity_low=intensity)
    return render_clip(label, seed=seed, split=split, index=index, difficulty=difficulty, size=64)


def _centroid(wave: np.ndarray, low_hz: float, high_hz: float) -> float:
    power = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2
    hertz = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE_HZ)
    band = (hertz > low_hz) & (hertz < high_hz)
    return float((hertz[band] * power[band]).sum() / power[band].sum())


def _flutter(wave: np.ndarray) -> float:
    """Share of the level's variation that lies at 5-8 Hz."""
    level = np.sqrt(np.mean(wave[: len(wave) // 160 * 160].reshape(-1, 160) ** 2, axis=1))
    power = np.abs(np.fft.rfft(level - level.mean())) ** 2
    hertz = np.fft.rfftfreq(len(level), 0.01)
    return float(power[(hertz > 5.5) & (hertz < 7.5)].sum() / power.sum())
