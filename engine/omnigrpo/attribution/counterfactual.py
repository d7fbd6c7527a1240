"""Prompts with a modality changed, and which clip stands in for which.

A baseline says what a modality is replaced by when it is out:

- ``remove``: by nothing. The prompt is the one of a data set that asks for the other modality only: no rows, and no
  wrapper text around them. It is a prompt the model may have been trained on, where a clip of zeros never is.
- ``swap``: by the same modality of another clip, the donor. Rows, positions and text stay as they are.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import replace

from omnigrpo.model.prompting import PromptEncoder
from omnigrpo.schema import ClipFeatures, Modality, PrefixInputs


def without(encoder: PromptEncoder, inputs: PrefixInputs, modalities: Collection[Modality]) -> PrefixInputs:
    """The prompt as it is when it does not ask for these modalities."""
    kept = tuple(m for m in inputs.prompt.modalities if m not in modalities)
    if kept == inputs.prompt.modalities:
        return inputs
    return encoder.encode(replace(inputs.prompt, modalities=kept), inputs.features)


def swapped(inputs: PrefixInputs, donor: PrefixInputs, modalities: Collection[Modality]) -> PrefixInputs:
    """The prompt with the donor's features of these modalities; question, gate and rows are its own.

    Raises ValueError when the donor lacks one of them.
    """
    for modality in modalities:
        if modality not in donor.prompt.modalities:
            raise ValueError(
                f"prompt {inputs.prompt.prompt_id!r} cannot take the {modality} of {donor.prompt.prompt_id!r}, which "
                f"has {' and '.join(donor.prompt.modalities) or 'none'}"
            )
    features = ClipFeatures(
        vision_FND=(donor if "video" in modalities else inputs).features.vision_FND,
        audio_AD=(donor if "audio" in modalities else inputs).features.audio_AD,
    )
    return replace(inputs, features=features)


def find_donor(
    inputs: PrefixInputs, neighbours: Sequence[PrefixInputs], modality: Modality
) -> PrefixInputs | None:
    """The neighbour whose clip stands in: the next one of another label, in turn, else the next other clip.

    None when no neighbour is of another clip and has the modality.
    """
    own = inputs.prompt
    ids = [neighbour.prompt.prompt_id for neighbour in neighbours]
    after = ids.index(own.prompt_id) + 1 if own.prompt_id in ids else 0
    others = [
        neighbour
        for neighbour in (*neighbours[after:], *neighbours[:after])
        if neighbour.prompt.clip != own.clip and modality in neighbour.prompt.modalities
    ]
    labelled = (other for other in others if other.prompt.solution != own.solution)
    return next(labelled, others[0] if others else None)


def derangement(labels: Sequence[str], seed: int) -> list[int]:
    """For each clip the index of another one: a permutation without fixed points, the same for the same seed.

    A random permutation, mended by exchanges: first wherever a clip got itself, then, where an exchange helps and harms
    nobody, wherever it got one of its own label. Raises ValueError for fewer than two clips.
    """
    count = len(labels)
    if count < 2:
        raise ValueError(f"to put one clip's modality in another's place takes two clips, got {count}")
    rng = random.Random(seed)
    donors = rng.sample(range(count), count)
    for clip in range(count):
        if donors[clip] == clip:
            other = (clip + rng.randrange(1, count)) % count
            donors[clip], donors[other] = donors[other], donors[clip]
    for clip in range(count):
        if labels[donors[clip]] == labels[clip]:
            _exchange(clip, donors, labels, rng.sample(range(count), count))
    return donors


def _exchange(clip: int, donors: list[int], labels: Sequence[str], order: Sequence[int]) -> None:
    """Exchange donors with the first clip that leaves the clip with another label and that one no worse off."""
    for other in order:
        mine, theirs = donors[other], donors[clip]
        if (
            labels[mine] != labels[clip]
            and theirs != other
            and (labels[theirs] != labels[other] or labels[mine] == labels[other])
        ):
            donors[clip], donors[other] = mine, theirs
            return
