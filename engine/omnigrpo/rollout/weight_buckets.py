"""Which weights a rollout engine of another process is sent, and in which portions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from omnigrpo.model.config import DecoderConfig
from omnigrpo.model.parts import part_of
from omnigrpo.rollout.decoder_shapes import HEAD_NAME, decoder_shapes
from omnigrpo.rollout.interface import RolloutError

_SHOWN = 4


class WeightBuckets:
    """Checks the decoder's weights and groups them."""

    def __init__(
        self,
        config: DecoderConfig,
        dtype: torch.dtype,
        bucket_bytes: int,
        *,
        others: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """``others``: shapes, by name, of weights outside the decoder that are sent as well."""
        self._others = dict(others or {})
        self._shapes = decoder_shapes(config) | self._others
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes

    def choose(self, weights: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """The engine's among them, uncopied. Raises RolloutError for one that it lacks or whose shape is another."""
        named = [(name, tensor) for name, tensor in weights if part_of(name) == "llm" or name in self._others]
        problems = [problem for name, tensor in named if (problem := self._problem(name, tensor))]
        if problems:
            more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise RolloutError(
                f"{len(problems)} of {len(named)} weights do not fit the engine's decoder, which keeps its old ones: "
                + "; ".join(problems[:_SHOWN])
                + more
            )
        return named

    def plan(self, chosen: Sequence[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
        """Neighbours, together at most ``bucket_bytes`` in the engine's dtype, or one larger weight; uncopied."""
        bucket: list[tuple[str, Tensor]] = []
        room = self._bucket_bytes
        for name, tensor in chosen:
            size = tensor.numel() * self._dtype.itemsize
            if bucket and size > room:
                yield bucket
                bucket, room = [], self._bucket_bytes
            bucket.append((name, tensor))
            room -= size
        if bucket:
            yield bucket

    def size_bytes(self, bucket: Sequence[tuple[str, Tensor]]) -> int:
        """Of a bucket in the engine's dtype."""
        return sum(tensor.numel() for _, tensor in bucket) * self._dtype.itemsize

    def cast(self, bucket: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """The bucket in the engine's dtype, without gradients."""
        return [(name, tensor.detach().to(self._dtype)) for name, tensor in bucket]

    def _problem(self, name: str, tensor: Tensor) -> str | None:
        expected = self._shapes.get(name)
        if expected is None:
            tied = " (its head is the embedding)" if name == HEAD_NAME else ""
            return f"{name} is none of its weights{tied}"
        found = tuple(tensor.shape)
        return None if found == expected else f"{name} has shape {found}, it needs {expected}"
