"""Groups that several steps sample: what is known of each, when it is too old, and its place in a checkpoint."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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


def restart_stale(jobs: Sequence[GroupJob], *, oldest_allowed: int) -> tuple[list[GroupJob], int]:
    """Throw away the samples with a token of an earlier version than that; returns the jobs and how many those were.

    A group waits for all of its samples, so a finished one may be too old as well.
    """
    kept = [
        replace(job, begun=tuple(None if _is_older(c, oldest_allowed) else c for c in job.begun))
        for job in jobs
    ]
    return kept, sum(_is_older(completion, oldest_allowed) for job in jobs for completion in job.begun)


def _is_older(completion: Completion | None, version: int) -> bool:
    return completion is not None and any(span.version < version for span in completion.version_spans)
