"""Groups that several steps sample: what there is of each, and its place in a checkpoint."""

from dataclasses import asdict, dataclass
from typing import Any

from omnigrpo.schema import Completion, PrefixInputs, VersionSpan

Tree = dict[str, Any]
"""Numbers, strings, None, and lists and dicts of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupJob:
    """A group that is wanted, and what there is of it."""

    inputs: PrefixInputs
    seeds: tuple[int, ...]
    """One per sample."""
    begun: tuple[Completion | None, ...] = ()
    """One per sample, finished or not; None for nothing yet. Empty for None everywhere."""

    def to_tree(self) -> Tree:
        """What ``from_tree`` needs beside the prompt's inputs."""
        return {
            "prompt_id": self.inputs.prompt.prompt_id,
            "seeds": list(self.seeds),
            "begun": [None if completion is None else asdict(completion) for completion in self.begun],
        }

    @classmethod
    def from_tree(cls, tree: Tree, inputs: PrefixInputs) -> "GroupJob":
        """Raises ValueError for inputs of another prompt."""
        if inputs.prompt.prompt_id != tree["prompt_id"]:
            raise ValueError(
                f"a group of prompt {tree['prompt_id']!r} got the inputs of {inputs.prompt.prompt_id!r}"
            )
        begun = tuple(None if part is None else completion_of_tree(part) for part in tree["begun"])
        return cls(inputs=inputs, seeds=tuple(tree["seeds"]), begun=begun)


def completion_of_tree(tree: Tree) -> Completion:
    """The completion whose ``asdict`` went through JSON or a checkpoint."""
    return Completion(
        token_ids=tuple(tree["token_ids"]),
        logprobs=tuple(tree["logprobs"]),
        finish_reason=tree["finish_reason"],
        version_spans=tuple(VersionSpan(**span) for span in tree["version_spans"]),
        cached_tokens=tree["cached_tokens"],
    )
