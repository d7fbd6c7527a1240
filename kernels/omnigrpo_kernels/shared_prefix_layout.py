"""Who attends to whom in a packed row: groups of a prefix and its completions, by their lengths.

Legend: ``T`` packed rows, ``P`` prefix rows, ``R`` rows of one completion.
"""

from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedPrefixLayout:
    """Lengths of the segments of one packed row, in packed order: prefix, its completions, next prefix, ..."""

    prefix_lengths: tuple[int, ...]
    """P of each group; each at least 1."""
    completion_lengths: tuple[tuple[int, ...], ...]
    """R of each completion, by group; a group may have none (prefill), a completion may be empty."""
    prefix_queries: bool = True
    """Whether q has the prefixes' rows. Without them its rows are the completions' alone, in packed order, while k and
    v have all rows: so a group's completions go through in parts that read keys and values computed once."""

    def __post_init__(self) -> None:
        """Raises ValueError for lengths that describe no packed row."""
        if not self.prefix_lengths:
            raise ValueError("SharedPrefixLayout: prefix_lengths is empty; give at least one group")
        if len(self.prefix_lengths) != len(self.completion_lengths):
            raise ValueError(
                f"SharedPrefixLayout: {len(self.prefix_lengths)} prefix lengths but {len(self.completion_lengths)} "
                "groups of completion lengths; give one tuple of completion lengths per prefix (it may be empty)"
            )
        _check_lengths("prefix_lengths", self.prefix_lengths, minimum=1)
        if not isinstance(self.completion_lengths, tuple):
            raise ValueError(
                f"SharedPrefixLayout: completion_lengths is a {type(self.completion_lengths).__name__}; "
                "give a tuple of tuples of integers"
            )
        for group, lengths in enumerate(self.completion_lengths):
            _check_lengths(f"completion_lengths[{group}]", lengths, minimum=0)

    @property
    def num_groups(self) -> int:
        """Groups in the packed row."""
        return len(self.prefix_lengths)

    @property
    def num_rows(self) -> int:
        """T, the rows of all groups: those of k and v."""
        return sum(self.group_lengths)

    @property
    def num_query_rows(self) -> int:
        """Rows of q and of the output."""
        return self.num_rows if self.prefix_queries else self.num_rows - sum(self.prefix_lengths)

    @property
    def group_lengths(self) -> tuple[int, ...]:
        """Rows of each group: its prefix and all of its completions."""
        return tuple(
            prefix + sum(lengths)
            for prefix, lengths in zip(self.prefix_lengths, self.completion_lengths, strict=True)
        )

    @property
    def group_starts(self) -> tuple[int, ...]:
        """Packed row of each group's first prefix row."""
        return tuple(accumulate(self.group_lengths[:-1], initial=0))

    @property
    def completion_starts(self) -> tuple[tuple[int, ...], ...]:
        """Packed row where each completion begins, by group; an empty completion begins where the next one does."""
        return tuple(
            tuple(accumulate(lengths[:-1], initial=start + prefix)) if lengths else ()
            for start, prefix, lengths in zip(
                self.group_starts, self.prefix_lengths, self.completion_lengths, strict=True
            )
        )


def _check_lengths(name: str, lengths: tuple[int, ...], *, minimum: int) -> None:
    if not isinstance(lengths, tuple) or not all(type(length) is int for length in lengths):
        raise ValueError(f"SharedPrefixLayout: {name} is {lengths!r}; give a tuple of integers")
    for index, length in enumerate(lengths):
        if length < minimum:
            raise ValueError(
                f"SharedPrefixLayout: {name}[{index}] is {length}; it must be at least {minimum}"
            )
