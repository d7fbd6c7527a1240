"""HumanOmni: frozen SigLIP and Whisper towers, gated projectors and a Qwen2 decoder.

Module names are the reference checkpoint's, so ``state_dict`` needs no translation.

Shape suffixes: ``B`` clips, ``F`` frames, ``S`` side in pixels, ``M`` mel bins, ``L`` mel frames,
``N`` patches, ``A`` pooled audio positions, ``D`` decoder width, ``T`` packed prefix rows, ``V`` vocabulary.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from omnigrpo.model.audio_tower import AudioTower
from omnigrpo.model.config import HumanOmniConfig
from omnigrpo.model.gate import QuestionStates, build_bert, build_gate
from omnigrpo.model.initialize import TRANSFORMER_STD, initialize, sinusoids
from omnigrpo.model.projectors import AllInOneSmall, mlp_2x_gelu
from omnigrpo.model.qwen2 import Qwen2Decoder
from omnigrpo.model.vision_tower import VisionTower
from omnigrpo.schema import AUDIO_ROW, VIDEO_ROW, ClipFeatures, PrefixInputs

CLIPS_PER_PASS = {"cpu": 1, "cuda": 4}
"""Clips in every tower pass, by device type.

A clip is 1568 rows of SigLIP and 1500 of Whisper. On two CPU cores that fills the GEMMs: 4 clips in one pass took
1.00 to 1.11 times as long as 4 passes. Four of them are two or more waves of tiles on the multiprocessors of an H100.
"""

TEXT_ROWS = 0
"""Stands for all text ids, which are not negative, beside VIDEO_ROW and AUDIO_ROW."""


class Backbone(nn.Module):
    """Every weight but an untied head, under the reference's names."""

    def __init__(self, config: HumanOmniConfig, decoder: Qwen2Decoder) -> None:
        super().__init__()
        width = config.decoder.width
        self.embed_tokens = decoder.embed_tokens
        self.layers = decoder.layers
        self.norm = decoder.norm
        self.vision_tower = VisionTower(config.vision)
        self.audio_tower = AudioTower(config.audio)
        self.mm_projector = AllInOneSmall(config.vision, width)
        self.audio_projector = mlp_2x_gelu(config.audio.width, width)
        self.bert_model = build_bert(config.gate)
        self.bert_gate = build_gate(config.gate)


class HumanOmni(nn.Module):
    """The whole model; towers and BERT start frozen, everything else trains."""

    def __init__(self, config: HumanOmniConfig) -> None:
        super().__init__()
        self.config = config
        decoder = Qwen2Decoder(config.decoder)
        self._decoder = (decoder,)  # In a tuple: its weights are registered once, under ``model``.
        self.model = Backbone(config, decoder)
        self.lm_head = (
            None
            if config.decoder.tie_word_embeddings
            else nn.Linear(config.decoder.width, config.decoder.vocab_size, bias=False)
        )
        self._question_states = QuestionStates(self.model.bert_model)
        self._bert_dropout = False
        self.freeze_towers()
        self.configure_bert(trainable=False)

    @property
    def decoder(self) -> Qwen2Decoder:
        """The Qwen2 decoder."""
        return self._decoder[0]

    @property
    def head_weight_VD(self) -> Tensor:
        """Weight of the vocabulary head; the embedding itself when tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Embed text tokens, ``[..., D]``."""
        return self.model.embed_tokens(token_ids)

    @torch.inference_mode(False)
    @torch.no_grad()
    def encode(self, pixels_BF3SS: Tensor | None, mel_BML: Tensor | None) -> list[ClipFeatures]:
        """Run the towers over B clips; a modality that is None is None in every result.

        Every pass has the same number of clips, the last one filled up with copies of its last clip, so that a
        clip meets the same kernels whoever shares the call. On the CPU, where a pass is one clip, its features are
        the same bits in any company; on CUDA they are as far as those kernels treat all rows alike.
        """
        sizes = [len(batch) for batch in (pixels_BF3SS, mel_BML) if batch is not None]
        if not sizes:
            raise ValueError("encode needs pixels, mel or both, got neither")
        if min(sizes) != max(sizes):
            raise ValueError(f"encode got {sizes[0]} clips of pixels but {sizes[1]} of mel")
        num_clips = sizes[0]
        vision = [None] * num_clips if pixels_BF3SS is None else self._encode_frames(pixels_BF3SS)
        audio = [None] * num_clips if mel_BML is None else self._encode_mel(mel_BML)
        return [ClipFeatures(vision_FND=v, audio_AD=a) for v, a in zip(vision, audio, strict=True)]

    def embed_prefixes(self, inputs: Sequence[PrefixInputs]) -> Tensor:
        """Embed prefixes, packed in order, ``[T, D]``; differentiable in projectors, gate and embedding."""
        ids_T = torch.cat([item.token_ids_P for item in inputs])
        with_video = [item for item in inputs if _takes(item, VIDEO_ROW, self.config.vision.num_tokens)]
        with_audio = [item for item in inputs if _takes(item, AUDIO_ROW, self.config.audio.num_tokens)]
        rows = {TEXT_ROWS: self.embed_tokens(ids_T[ids_T >= 0].to(self.device))}
        if with_video:
            rows[VIDEO_ROW] = self._visual_rows(with_video)
        if with_audio:
            rows[AUDIO_ROW] = self._audio_rows(with_audio)
        return interleave_rows(ids_T, rows)

    def freeze_towers(self) -> None:
        """Take both towers out of training."""
        self.model.vision_tower.requires_grad_(False)
        self.model.audio_tower.requires_grad_(False)

    def configure_bert(self, *, trainable: bool, dropout: bool = False) -> None:
        """Choose whether BERT trains and whether its dropout is live in train mode (the reference: both)."""
        for name, parameter in self.model.bert_model.named_parameters():
            parameter.requires_grad_(trainable and not name.startswith("pooler."))
        self._bert_dropout = dropout
        self.train(self.training)

    def reset_gate(self, seed: int) -> None:
        """Draw the gate's MLP anew, as PyTorch initialises linear layers; the global generator is left alone.

        What the reference's supervised training does at its start. It also loads the stock BERT again, which no
        supervised training has changed.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for layer in self.model.bert_gate:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that train, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def train(self, mode: bool = True) -> "HumanOmni":
        """Switch the mode; towers stay in eval mode, and so does BERT unless its dropout is wanted."""
        super().train(mode)
        self.model.vision_tower.eval()
        self.model.audio_tower.eval()
        self.model.bert_model.train(mode and self._bert_dropout)
        return self

    def init_weights(self, seed: int) -> None:
        """Draw all weights anew from a seed; the global generator is left alone."""
        backbone = self.model
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for module in (backbone.embed_tokens, backbone.layers, backbone.norm, self.lm_head):
                if module is not None:
                    initialize(module, transformer=True)
            for module in (backbone.bert_model, backbone.bert_gate):
                initialize(module, transformer=True)
            for module in (backbone.mm_projector, backbone.audio_projector):
                initialize(module, transformer=False)
            for module in (backbone.vision_tower, backbone.audio_tower):
                initialize(module, transformer=False)
            nn.init.normal_(backbone.vision_tower.vision_tower.vision_model.head.probe, std=TRANSFORMER_STD)
        positions = backbone.audio_tower.audio_tower.encoder.embed_positions.weight
        with torch.no_grad():
            positions.copy_(sinusoids(*positions.shape))

    def _encode_frames(self, pixels_BF3SS: Tensor) -> list[Tensor]:
        features: list[Tensor] = []
        for clips, count in self._passes(pixels_BF3SS):
            patches = self.model.vision_tower(clips.flatten(0, 1)).unflatten(0, (len(clips), -1))
            features += [clip_FND.clone() for clip_FND in patches[:count]]
        return features

    def _encode_mel(self, mel_BML: Tensor) -> list[Tensor]:
        features: list[Tensor] = []
        for clips, count in self._passes(mel_BML):
            features += [clip_AD.clone() for clip_AD in self.model.audio_tower(clips)[:count]]
        return features

    def _passes(self, clips: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Equally many clips a time, on the model's device, and how many of them are not mere filling."""
        size = CLIPS_PER_PASS[self.device.type]
        for members in clips.split(size):
            members = members.to(self.device)
            filling = members[-1:].expand(size - len(members), *members.shape[1:])
            yield (torch.cat([members, filling]) if len(filling) else members), len(members)

    def _visual_rows(self, inputs: Sequence[PrefixInputs]) -> Tensor:
        """Project all clips of the call at once, ``[sum of visual rows, D]``."""
        questions = [tuple(item.question_ids.tolist()) for item in inputs]
        if self.model.bert_model.training:  # Every clip with a dropout mask of its own.
            weights_B3 = self.model.bert_gate(self._question_states(questions)).softmax(-1)
        else:
            distinct = list(dict.fromkeys(questions))
            weights_Q3 = self.model.bert_gate(self._question_states(distinct)).softmax(-1)
            weights_B3 = weights_Q3[torch.tensor([distinct.index(q) for q in questions], device=self.device)]
        features_BFNC = self._stack([item.features.vision_FND for item in inputs])
        return self.model.mm_projector(features_BFNC, weights_B3).flatten(0, 1)

    def _audio_rows(self, inputs: Sequence[PrefixInputs]) -> Tensor:
        """Project all clips of the call at once, ``[sum of audio rows, D]``."""
        return self.model.audio_projector(self._stack([item.features.audio_AD for item in inputs])).flatten(
            0, 1
        )

    def _stack(self, features: Sequence[Tensor | None]) -> Tensor:
        """Stack in the projectors' dtype, on the model's device."""
        dtype = self.head_weight_VD.dtype
        return torch.stack([f.to(self.device, dtype) for f in features if f is not None])


def reference_copy(model: HumanOmni) -> HumanOmni:
    """Return a frozen copy in eval mode; it shares what is frozen in ``model`` already (towers, BERT)."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    reference = copy.deepcopy(model, dict(shared))
    reference.requires_grad_(False)
    return reference.eval()


def _takes(item: PrefixInputs, row_id: int, num_tokens: int) -> bool:
    """Whether the prefix has rows of this modality; raises ValueError when rows and features disagree."""
    rows = int((item.token_ids_P == row_id).sum())
    features = item.features.vision_FND if row_id == VIDEO_ROW else item.features.audio_AD
    modality = "video" if row_id == VIDEO_ROW else "audio"
    where = f"prompt {item.prompt.prompt_id!r}"
    if rows == 0:
        return False
    if features is None:
        raise ValueError(
            f"{where} has {rows} {modality} rows but no {modality} features; encode the clip first"
        )
    if rows != num_tokens:
        raise ValueError(f"{where} has {rows} {modality} rows, the model makes {num_tokens} of each clip")
    return True


def interleave_rows(ids_T: Tensor, rows: Mapping[int, Tensor]) -> Tensor:
    """Put every kind's rows where ``ids_T`` has them, in one copy; a kind is a negative id or TEXT_ROWS."""
    run_kinds, run_lengths = torch.unique_consecutive(ids_T.clamp(max=TEXT_ROWS), return_counts=True)
    runs = list(zip(run_kinds.tolist(), run_lengths.tolist(), strict=True))
    dtype = rows[TEXT_ROWS].dtype
    pieces = {
        kind: iter(rows[kind].to(dtype).split([length for other, length in runs if other == kind]))
        for kind in {kind for kind, _ in runs}
    }
    return torch.cat([next(pieces[kind]) for kind, _ in runs])
