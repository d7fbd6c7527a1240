"""The frame rule against the cases measured on the reference."""

import pytest

from omnigrpo.media.sampling import SamplingConfig, uniform_frame_indices


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [
        (8, (0, 1, 2, 3, 4, 5, 6, 7)),
        (16, (1, 3, 5, 7, 8, 10, 12, 14)),
        (50, (3, 9, 15, 21, 28, 34, 40, 46)),
        (100, (6, 19, 31, 43, 56, 68, 80, 93)),
        (1, (0,) * 8),
    ],
)
def test_the_listed_cases(num_frames: int, expected: tuple[int, ...]):
    assert uniform_frame_indices(num_frames, 8) == expected


@pytest.mark.parametrize("num_wanted", [1, 4, 8, 32])
def test_indices_are_sorted_and_inside_the_clip(num_wanted: int):
    for num_frames in range(1, 200):
        indices = uniform_frame_indices(num_frames, num_wanted)
        assert len(indices) == num_wanted
        assert list(indices) == sorted(indices)
        assert 0 <= indices[0] <= indices[-1] < num_frames


@pytest.mark.parametrize(("num_frames", "num_wanted"), [(0, 8), (8, 0), (-1, 1)])
def test_nothing_to_choose_from_is_an_error(num_frames: int, num_wanted: int):
    with pytest.raises(ValueError, match="must be at least 1, got"):
        uniform_frame_indices(num_frames, num_wanted)


def test_a_config_names_what_is_wrong_with_it():
    with pytest.raises(ValueError, match=r"sampling\.num_frames must be at least 1, got 0"):
        SamplingConfig(num_frames=0)
    with pytest.raises(ValueError, match=r"sampling\.min_frames must be at least 1, got 0"):
        SamplingConfig(min_frames=0)
    with pytest.raises(ValueError, match=r"sampling\.frame_policy must be 'uniform', got 'dense'"):
        SamplingConfig(frame_policy="dense")  # type: ignore[arg-type]
