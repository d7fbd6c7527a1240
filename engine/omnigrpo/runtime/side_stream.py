"""A CUDA stream of its own for work that runs beside the consumer's; on a CPU everything here does nothing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Handover:
    """Tensors that a side stream computes for another stream."""

    tensors: tuple[Tensor, ...]
    done: torch.cuda.Event | None
    """Recorded after the work on them; None on a CPU, where they are ready."""

    def receive(self) -> None:
        """Let the caller's stream wait for the tensors, and keep their memory until that stream is done with them."""
        if self.done is None:
            return
        for tensor in self.tensors:
            if tensor.is_cuda:
                stream = torch.cuda.current_stream(tensor.device)
                stream.wait_event(self.done)
                tensor.record_stream(stream)


class SideStream:
    """Copies and kernels between ``work()`` and ``hand_over`` overlap with those of other streams.

    What the work reads on the device must be there when the object is made (weights); nothing is waited for later.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def work(self) -> Iterator[None]:
        """Make the stream the thread's current one for the time of a block."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            yield

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy to the device through pinned memory, without waiting; what is there already stays there.

        Its memory is kept until this stream is done with it; that it is computed is for the caller to see to.
        """
        if self._stream is None:
            return tensor
        if tensor.is_cuda:
            tensor.record_stream(self._stream)
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copy to pinned memory and wait until everything on this stream is done; what is there already stays."""
        if self._stream is None:
            return list(tensors)
        copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        self._stream.synchronize()
        return copies

    def hand_over(self, tensors: Sequence[Tensor]) -> Handover:
        """Mark the end of the work on these tensors."""
        done = None
        if self._stream is not None:
            done = torch.cuda.Event()
            done.record(self._stream)
        return Handover(tensors=tuple(tensors), done=done)
