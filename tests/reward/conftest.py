from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from omnigrpo.schema import Clip, ClipFeatures, Completion, Group, PrefixInputs, Prompt, VersionSpan


def _group(*texts: str, solution: str = "happy", prompt_id: str = "clip-7") -> Group:
    prompt = Prompt(
        prompt_id=prompt_id,
        clip=Clip(path=Path("clip.mp4")),
        question="Which emotion?",
        modalities=("video", "audio"),
        solution=solution,
    )
    inputs = PrefixInputs(
        prompt=prompt,
        token_ids_P=torch.tensor([1, 2]),
        question_ids=torch.tensor([1]),
        features=ClipFeatures(vision_FND=None, audio_AD=None),
    )
    completion = Completion(
        token_ids=(3, 4),
        logprobs=(-0.1, -0.2),
        finish_reason="stop",
        version_spans=(VersionSpan(version=0, num_tokens=2),),
        cached_tokens=2,
    )
    return Group(inputs=inputs, completions=(completion,) * len(texts), texts=texts)


@pytest.fixture
def make_group() -> Callable[..., Group]:
    """Builds a group from the texts of its completions."""
    return _group
