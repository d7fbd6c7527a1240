"""Which clip stands in for which, and what a prompt becomes without a modality."""

from collections import Counter
from dataclasses import replace

import pytest

from omnigrpo.attribution.counterfactual import derangement, find_donor, swapped


@pytest.mark.parametrize("count", [2, 3, 7, 40])
@pytest.mark.parametrize("seed", range(20))
def test_a_derangement_is_a_permutation_without_fixed_points(count, seed) -> None:
    donors = derangement([str(clip % 3) for clip in range(count)], seed)
    assert sorted(donors) == list(range(count))
    assert all(donor != clip for clip, donor in enumerate(donors))
    assert derangement([str(clip % 3) for clip in range(count)], seed) == donors


@pytest.mark.parametrize("labels", ["aabb", "aabc", "abcdefg" * 6, "aaabbbc", "aaaabbcd"])
@pytest.mark.parametrize("seed", range(20))
def test_every_donor_has_another_label_where_that_is_possible(labels, seed) -> None:
    donors = derangement(labels, seed)
    assert all(labels[donor] != labels[clip] for clip, donor in enumerate(donors))


@pytest.mark.parametrize("seed", range(20))
def test_with_one_label_in_the_majority_as_few_as_possible_keep_their_own(seed) -> None:
    labels = "aaaaaaab"
    donors = derangement(labels, seed)
    kept = Counter(labels[donor] == labels[clip] for clip, donor in enumerate(donors))
    assert kept[True] == 6
    assert all(donor != clip for clip, donor in enumerate(donors))


def test_other_seeds_give_other_donors() -> None:
    assert len({tuple(derangement("abcdefg" * 3, seed)) for seed in range(10)}) == 10


def test_one_clip_has_no_donor() -> None:
    with pytest.raises(ValueError, match="takes two clips, got 1"):
        derangement(["a"], 0)


@pytest.fixture
def prefixes(builders):
    def labelled(name, solution, **more):
        inputs = builders.inputs(name, **more)
        return replace(inputs, prompt=replace(inputs.prompt, solution=solution))

    return [
        labelled("a", "sad"),
        labelled("b", "sad"),
        labelled("c", "fear", modalities=("video",)),
        labelled("d", "fear"),
    ]


def test_the_next_neighbour_of_another_label_is_the_donor(prefixes) -> None:
    a, b, c, d = prefixes
    assert find_donor(a, prefixes, "audio") is d
    assert find_donor(a, prefixes, "video") is c
    assert find_donor(d, prefixes, "audio") is a
    assert find_donor(a, [a, b], "audio") is b
    assert find_donor(a, [a], "audio") is None
    assert find_donor(a, [a, c], "audio") is None
    same_clip = replace(b, prompt=replace(b.prompt, clip=a.prompt.clip))
    assert find_donor(a, [a, same_clip], "audio") is None


def test_a_swap_changes_the_features_alone(prefixes) -> None:
    a, b, c, _ = prefixes
    changed = swapped(a, b, ("audio",))
    assert changed.features.audio_AD is b.features.audio_AD
    assert changed.features.vision_FND is a.features.vision_FND
    assert changed.token_ids_P is a.token_ids_P
    assert changed.prompt is a.prompt
    with pytest.raises(ValueError, match="'a' cannot take the audio of 'c', which has video"):
        swapped(a, c, ("audio",))
