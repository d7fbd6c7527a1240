# pyright: reportMissingImports=false
# SGLang lives in an environment of its own (make sglang).
"""What SGLang is asked on its event loop: plain values in, plain values out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from omnigrpo.rollout.interface import RolloutError
from omnigrpo.rollout.sglang_plugin.names import COUNTERS_NAME, MISFIT
from omnigrpo.rollout.sglang_requests import GenerateCall, Generated
from omnigrpo.rollout.sglang_weights import WeightsRefusedError

if TYPE_CHECKING:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerCounters:
    """What the model in SGLang's process has done since it was built."""

    prefill_calls: int
    """Batches with at least one prompt row."""
    prefill_rows: int
    """Rows of those batches."""
    encoder_calls: int
    """Media whose rows were asked of the towers, sound and pictures counted apart."""


async def generate(manager: "TokenizerManager", call: GenerateCall) -> list[Generated]:
    """Draw the samples of one call; RolloutError when SGLang ends one of them for a reason of its own."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    nested = call.num_samples > 1  # Its batches take a list of lists, its single requests a list.
    media = {name: [list(items)] if nested else list(items) for name, items in call.media.items()}
    request = GenerateReqInput(
        input_ids=list(call.token_ids),
        sampling_params=dict(call.sampling) | {"n": call.num_samples},
        return_logprob=True,
        rid=call.request_id,
        **media,  # type: ignore[arg-type] - video_data and audio_data
    )
    # Read to its end, though the first item is all of it: until then it counts as under way.
    (outputs,) = [answer async for answer in manager.generate_request(request, None)]
    return [Generated.from_output(output) for output in (outputs if nested else [outputs])]


def end_tokens(manager: "TokenizerManager") -> set[int]:
    """Tokens at which SGLang ends a completion, asked or not, unless it ignores them all."""
    tokenizer = manager.tokenizer
    listed = (
        manager.model_config.hf_eos_token_id,
        tokenizer.additional_stop_token_ids,
        {tokenizer.eos_token_id},
    )
    return {token for tokens in listed if tokens for token in tokens if token is not None}


def abort(manager: "TokenizerManager", request_id: str) -> None:
    """End what is left of a call; its samples come back unfinished, or not at all."""
    manager.abort_request(request_id)


async def update_weights(
    manager: "TokenizerManager", bucket: Sequence[tuple[str, Tensor]], *, ranks: int, version: int | None
) -> None:
    """Copy one bucket of weights into the model; with a version it is the last one, and the prefix cache is emptied.

    The bucket is one flat tensor, which the other processes map: shared memory on a CPU, an IPC handle on CUDA.
    Raises WeightsRefusedError when one does not fit, RolloutError when SGLang refuses it for another reason.
    """
    from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    flat = FlattenedTensorBucket(named_tensors=list(bucket))
    tensor = flat.get_flattened_tensor()
    if tensor.is_cuda:
        monkey_patch_torch_reductions()  # Names devices by their UUID: the children may number them differently.
    content = {"flattened_tensor": tensor, "metadata": flat.get_metadata()}
    request = UpdateWeightsFromTensorReqInput(
        serialized_named_tensors=[MultiprocessingSerializer.serialize(content) for _ in range(ranks)],
        load_format="flattened_bucket",
        flush_cache=version is not None,
        weight_version=None if version is None else str(version),
    )
    accepted, message = await manager.update_weights_from_tensor(request, None)
    if not accepted:
        refused = WeightsRefusedError if MISFIT in message else RolloutError
        raise refused(f"SGLang refused the weights: {message}")
    if tensor.is_cuda:
        torch.cuda.ipc_collect()


async def set_version(manager: "TokenizerManager", version: int) -> None:
    """Forget all prefixes and name the weights anew, where none of the decoder's has changed."""
    await flush_cache(manager)
    manager._update_weight_version_if_provided(str(version))


async def flush_cache(manager: "TokenizerManager") -> None:
    """Forget all prefixes; RolloutError while requests are under way."""
    answer = await manager.flush_cache()
    if not answer.success:
        raise RolloutError(
            f"SGLang could not empty its prefix cache: {answer.message or 'requests are under way'}"
        )


async def pause(manager: "TokenizerManager") -> None:
    """Stop drawing tokens; KV rows stay."""
    from sglang.srt.managers.io_struct import PauseGenerationReqInput

    await manager.pause_generation(PauseGenerationReqInput(mode="in_place"))


async def resume(manager: "TokenizerManager") -> None:
    """Go on."""
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput

    await manager.continue_generation(ContinueGenerationReqInput())


async def release_memory(manager: "TokenizerManager") -> None:
    """Free KV cache, weights (kept on the host) and graphs."""
    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

    await manager.release_memory_occupation(ReleaseMemoryOccupationReqInput(), None)


async def restore_memory(manager: "TokenizerManager") -> None:
    """Allocate again what was freed."""
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

    await manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(), None)


async def server_counters(manager: "TokenizerManager") -> ServerCounters:
    """Read them from the first device's process."""
    from sglang.srt.managers.io_struct import GetWeightsByNameReqInput

    found = await manager.get_weights_by_name(GetWeightsByNameReqInput(name=COUNTERS_NAME), None)
    calls, rows, encoder_calls = found
    return ServerCounters(prefill_calls=calls, prefill_rows=rows, encoder_calls=encoder_calls)
