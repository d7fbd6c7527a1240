"""The processes of a run; every collective of the engine is here."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed
from torch import Tensor, nn

_BUCKET_ELEMENTS = 1 << 25
"""Gradients are reduced in flat buckets of about this many elements."""


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This process among those that train together; alone, no collective runs and nothing is initialised."""

    rank: int = 0
    """0 .. size - 1."""
    size: int = 1
    """Processes that train together."""
    local_rank: int = 0
    """Rank among the processes of this machine; the index of its CUDA device."""

    @classmethod
    def from_environment(cls, device_type: str = "cpu") -> "World":
        """Join the run that torchrun started, or be alone without one.

        Collectives run over NCCL for ``cuda`` and gloo otherwise. Blocks until every process has joined.
        """
        size = _environment_integer("WORLD_SIZE", default=1)
        if size == 1:
            return cls()
        world = cls(
            rank=_environment_integer("RANK"), size=size, local_rank=_environment_integer("LOCAL_RANK")
        )
        if not 0 <= world.rank < size:
            raise ValueError(f"RANK is {world.rank}, but WORLD_SIZE is {size}; start the run with torchrun")
        if device_type == "cuda":
            torch.cuda.set_device(world.local_rank)
        backend = "nccl" if device_type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, rank=world.rank, world_size=size)
        return world

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of ``tensor`` over all processes; collective, the input is left alone."""
        if self.size == 1:
            return tensor.clone()
        # NCCL reduces what is on its device only.
        on_device = tensor.cuda() if torch.distributed.get_backend() == "nccl" else tensor
        total = on_device.clone()
        torch.distributed.all_reduce(total, op=torch.distributed.ReduceOp.SUM)
        return total.to(tensor.device)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes; collective.

        A process that has no gradient for a parameter adds 0; a parameter that has none anywhere keeps none.
        """
        if self.size == 1 or not parameters:
            return
        present = self.sum(torch.tensor([parameter.grad is not None for parameter in parameters]).int())
        reduced = [p for p, count in zip(parameters, present.tolist(), strict=True) if count]
        for parameter in reduced:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets(parameter.grad for parameter in reduced if parameter.grad is not None):
            total = self.sum(torch.cat([gradient.flatten() for gradient in bucket]))
            parts = total.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def barrier(self) -> None:
        """Wait until every process is here; collective."""
        if self.size > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Leave the run; no collective works afterwards."""
        if self.size > 1:
            torch.distributed.destroy_process_group()


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, about ``_BUCKET_ELEMENTS`` at a time."""
    for _, neighbours in groupby(gradients, key=lambda gradient: gradient.dtype):
        bucket: list[Tensor] = []
        for gradient in neighbours:
            bucket.append(gradient)
            if sum(item.numel() for item in bucket) >= _BUCKET_ELEMENTS:
                yield bucket
                bucket = []
        if bucket:
            yield bucket


def _environment_integer(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdigit():
        raise ValueError(
            f"the environment variable {name} must be an integer, got {text!r}; torchrun sets it, so start "
            "the run with torchrun, or unset WORLD_SIZE to train with one process"
        )
    return int(text)
