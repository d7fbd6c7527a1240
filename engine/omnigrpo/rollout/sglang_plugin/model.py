# pyright: reportMissingImports=false
# SGLang lives in an environment of its own (make sglang).
"""HumanOmni as SGLang runs it: SGLang's own Qwen2 decoder behind rows of video and audio.

The rows come with the request, or the checkpoint's towers and projectors make them here, as the configuration says.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from sglang.srt.layers.rotary_embedding import base as rotary_embedding
from sglang.srt.managers.mm_utils import (
    MultiModalityDataPaddingPatternMultimodalTokens,
    general_mm_embed_routine,
)
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from torch import Tensor, nn

from omnigrpo.feature_source import RECIPE_VERSION
from omnigrpo.model.checkpoint_format import read_config
from omnigrpo.model.config import DecoderConfig
from omnigrpo.model.parts import part_of
from omnigrpo.rollout.decoder_shapes import decoder_shapes, geometry_of
from omnigrpo.rollout.sglang_plugin.encoders import Encoders
from omnigrpo.rollout.sglang_plugin.names import COUNTERS_NAME, IDENTITY_NAME, MISFIT, PRECOMPUTED_KEY


class MisfitError(ValueError):
    """Weights that the model lacks, or of other shapes; none of their bucket was copied."""


class HumanOmniQwen2ForCausalLM(nn.Module):
    """The decoder under the checkpoint's names, and the encoders unless rows come ready-made."""

    def __init__(self, config, quant_config=None, prefix: str = "") -> None:
        super().__init__()
        self.config = config
        with _rope_of_torch():
            self.language_model = Qwen2ForCausalLM(config, quant_config, prefix)
        self._encoders = None if getattr(config, PRECOMPUTED_KEY, False) else _encoders(config)
        self._shapes = decoder_shapes(_decoder_config(config)) | (
            self._encoders.shapes if self._encoders else {}
        )
        self._prefill_calls = self._prefill_rows = self._encoder_calls = 0

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.language_model.get_input_embeddings()

    def pad_input_ids(self, input_ids: list[int], mm_inputs) -> list[int]:
        """Put each item's content value at its rows, so that equal prefixes are those with equal media."""
        return MultiModalityDataPaddingPatternMultimodalTokens().pad_input_tokens(input_ids, mm_inputs)

    def get_video_feature(self, items) -> Tensor:
        """Rows of clips that came as pixels. RuntimeError in an engine for ready-made rows."""
        encoders = self._count_encoding(items)
        return encoders.video_rows([item.feature for item in items], [item.question_ids for item in items])

    def get_audio_feature(self, items) -> Tensor:
        """Rows of clips that came as log-mel. RuntimeError in an engine for ready-made rows."""
        encoders = self._count_encoding(items)
        return encoders.audio_rows([item.feature for item in items])

    @torch.no_grad()
    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch, **options):
        """Logits of the rows that SGLang samples from."""
        if forward_batch.forward_mode.is_extend():
            self._prefill_calls += 1
            self._prefill_rows += len(input_ids)
        return general_mm_embed_routine(
            input_ids=input_ids,
            forward_batch=forward_batch,
            language_model=self.language_model,
            multimodal_model=self,
            positions=positions,
            **options,
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy weights by their names in the checkpoint; without encoders, theirs are left out.

        Nothing is copied when one of them does not fit. Raises MisfitError for a name or shape that the model lacks.
        """
        named = [(name, tensor) for name, tensor in weights if self._encoders or part_of(name) == "llm"]
        problems = [problem for name, tensor in named if (problem := self._problem(name, tensor))]
        if problems:
            raise MisfitError(f"{MISFIT}: {'; '.join(problems)}")
        self.language_model.load_weights([item for item in named if part_of(item[0]) == "llm"])
        if self._encoders:
            self._encoders.load(item for item in named if part_of(item[0]) != "llm")
        if any(tensor.is_cuda for _, tensor in named):
            torch.cuda.synchronize()  # The sender may reuse its memory as soon as SGLang answers.

    def get_weights_by_name(
        self, name: str, truncate_size: int = 100, tp_size: int = 1
    ) -> list[int] | list[str]:
        """Read the counters, or what the model is; SGLang has no other way to ask a model something."""
        if name == IDENTITY_NAME:
            dtype = str(next(self.language_model.parameters()).dtype).removeprefix("torch.")
            mode = "raw" if self._encoders else "precomputed"
            return [geometry_of(_decoder_config(self.config)), dtype, mode, str(RECIPE_VERSION)]
        if name != COUNTERS_NAME:
            raise ValueError(f"only {COUNTERS_NAME!r} and {IDENTITY_NAME!r} can be read, got {name!r}")
        return [self._prefill_calls, self._prefill_rows, self._encoder_calls]

    def _count_encoding(self, items) -> Encoders:
        self._encoder_calls += len(items)
        if self._encoders is None:
            raise RuntimeError(
                f"{len(items)} media items came without their rows, but this engine was started for ready-made rows"
            )
        return self._encoders

    def _problem(self, name: str, tensor: Tensor) -> str | None:
        expected = self._shapes.get(name)
        if expected is None:
            return f"{name} is none of its weights"
        found = tuple(tensor.shape)
        return None if found == expected else f"{name} has shape {found}, the model needs {expected}"


def _encoders(config) -> Encoders:
    """Of the checkpoint that the configuration was read from."""
    return Encoders(read_config(Path(config.name_or_path)))


def _decoder_config(config) -> DecoderConfig:
    """Its geometry; what does not change a shape is left at its default."""
    return DecoderConfig(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        ffn_width=config.intermediate_size,
        tie_word_embeddings=config.tie_word_embeddings,
    )


@contextmanager
def _rope_of_torch() -> Iterator[None]:
    """Build rotary embeddings that need no kernel of vLLM where there is no accelerator.

    Without one, and unless it was told to use its own CPU kernels (SGLANG_USE_CPU_ENGINE), SGLang imports
    ``vllm._custom_ops.rotary_embedding`` when it builds the layer, and then runs the layer's PyTorch version anyway.
    """
    taken_for_cpu = rotary_embedding._is_cpu
    rotary_embedding._is_cpu = taken_for_cpu or not torch.cuda.is_available()
    try:
        yield
    finally:
        rotary_embedding._is_cpu = taken_for_cpu
