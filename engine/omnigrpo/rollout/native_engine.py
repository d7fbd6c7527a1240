"""The in-process rollout engine: it samples from the policy model itself, whose weights it shares.

Legend: ``B`` groups of a wave, ``W`` slots of a group, ``S`` rows (samples), ``T`` packed prefix rows,
``R`` new tokens, ``V`` vocabulary, ``D`` width, ``L`` layers, ``N`` query heads, ``K`` key/value heads,
``H`` head width.
"""

import dataclasses
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from omnigrpo.model.config import DecoderConfig
from omnigrpo.model.qwen2 import Attend
from omnigrpo.rollout.decode_cache import (
    Grid,
    OwnCache,
    PrefixCache,
    SharedPrefixAttention,
    cache_dtype,
    matmul_float32,
)
from omnigrpo.rollout.interface import (
    FinishedGroup,
    GroupRequest,
    RolloutCounters,
    SamplingParams,
    Spans,
)
from omnigrpo.rollout.sampling import sample_tokens
from omnigrpo.runtime.spans import Phase
from omnigrpo.schema import (
    Completion,
    Prefix,
    PrefixStates,
    SharedPrefixLayout,
    VersionSpan,
    joined_positions,
)


class PolicyDecoder(Protocol):
    """The decoder as the engine calls it."""

    @property
    def config(self) -> DecoderConfig:
        """Its geometry."""
        ...

    def prefill(self, embeddings_TD: Tensor, positions_T: Tensor, layout: SharedPrefixLayout) -> PrefixStates:
        """Hidden rows after the final norm, and each layer's keys, with rotary applied, and values."""
        ...

    def decode(self, embeddings_SD: Tensor, positions_S: Tensor, attend: Attend) -> Tensor:
        """Hidden rows after the final norm of one token per sample."""
        ...


class PolicyModel(Protocol):
    """The model as the engine calls it."""

    @property
    def decoder(self) -> PolicyDecoder:
        """The decoder."""
        ...

    @property
    def head_weight_VD(self) -> Tensor:
        """The vocabulary projection."""
        ...

    def embed_tokens(self, token_ids: Tensor, /) -> Tensor:
        """Text embeddings of token ids."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Every submodule; an ``nn.Module`` has it."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class NativeEngineConfig:
    """Memory budgets of the engine."""

    max_prefill_tokens: int = 16384
    """Prefix rows of one prefill call; a longer prefix is prefilled alone."""
    max_decode_rows: int = 256
    """Samples decoded at once; a larger group, which is never split, is decoded alone."""
    release_idle_fraction: float = 0.25
    """Finished rows are released once they are this share of the batch; 0 releases them at once."""

    def __post_init__(self) -> None:
        """Reject budgets that admit nothing."""
        for name in ("max_prefill_tokens", "max_decode_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.release_idle_fraction <= 1:
            raise ValueError(f"release_idle_fraction must be in [0, 1], got {self.release_idle_fraction}")


class _NoSpans:
    """Times nothing."""

    def span(self, name: str) -> AbstractContextManager[object]:
        return nullcontext()


@dataclass(slots=True)
class _Wave:
    """The state of one batch while it decodes."""

    prefix: PrefixCache
    own: OwnCache
    grid: Grid
    row_S: Tensor
    """int64: where each live row's tokens go in the outputs."""
    seed_S: Tensor
    """int64."""
    position_S: Tensor
    """int64: position of the row's first own token, which follows its prefix."""
    finished_S: Tensor
    """bool: the row has drawn a stop token and waits for its release."""


class NativeEngine:
    """Prefills each group's prefix once and decodes its samples against it, many groups in one batch."""

    def __init__(
        self, model: PolicyModel, config: NativeEngineConfig | None = None, *, spans: Spans | None = None
    ) -> None:
        """Share ``model``'s weights: what the trainer writes into them is what samples."""
        self._model: PolicyModel | None = model
        self._config = config or NativeEngineConfig()
        self._spans = spans or _NoSpans()
        self._version = 0
        self._counters = RolloutCounters()

    @property
    def counters(self) -> RolloutCounters:
        """Totals so far."""
        return self._counters

    def publish(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Name the weights; they are the model's own, so nothing is copied."""
        self._version = version

    def close(self) -> None:
        """Let go of the model."""
        self._model = None

    @property
    def overlaps_training(self) -> bool:
        """False: the weights are the trainer's own."""
        return False

    def pause(self) -> None:
        """Nothing to do: tokens are drawn only while a stream is read."""

    def resume(self) -> None:
        """Nothing to do."""

    def release_memory(self) -> None:
        """Nothing to do: caches live as long as a stream."""

    def restore_memory(self) -> None:
        """Nothing to do."""

    def generate(
        self, requests: Sequence[GroupRequest], sampling: SamplingParams
    ) -> Generator[FinishedGroup, None, None]:
        """Draw the samples of every request while the stream is read; one without seeds is not prefilled.

        Raises ``ValueError`` before any work when an argument cannot be honoured, and ``FloatingPointError``
        when the model's logits are not finite.
        """
        model = self._open_model()
        prefixes, seeds = [r.prefix for r in requests], [r.seeds for r in requests]
        _validate(model, prefixes, sampling, seeds)
        return self._finished(model, prefixes, sampling, seeds)

    @torch.no_grad()
    def _finished(
        self,
        model: PolicyModel,
        prefixes: Sequence[Prefix],
        sampling: SamplingParams,
        seeds: Sequence[Sequence[int]],
    ) -> Generator[FinishedGroup, None, None]:
        yield from (FinishedGroup(index=i, completions=()) for i, group in enumerate(seeds) if not group)
        for wave in self._waves(prefixes, seeds):
            with _evaluating(model):
                head_VD = model.head_weight_VD
                head_VD = head_VD.to(cache_dtype(head_VD))
                drawn = self._generate_wave(
                    model, head_VD, [prefixes[i] for i in wave], sampling, [seeds[i] for i in wave]
                )
            for index, group in zip(wave, drawn, strict=True):
                yield FinishedGroup(index=index, completions=group)

    def _open_model(self) -> PolicyModel:
        if self._model is None:
            raise RuntimeError("this rollout engine is closed; build a new NativeEngine to generate")
        return self._model

    def _waves(self, prefixes: Sequence[Prefix], seeds: Sequence[Sequence[int]]) -> list[list[int]]:
        """Groups by length of prefix, so that a wave pads little, within the budget of rows."""
        wanted = [index for index in range(len(prefixes)) if len(seeds[index])]
        wanted.sort(key=lambda index: _num_rows(prefixes[index]))
        sizes = [len(seeds[index]) for index in wanted]
        return [[wanted[i] for i in run] for run in _runs_within(sizes, self._config.max_decode_rows)]

    def _generate_wave(
        self,
        model: PolicyModel,
        head_VD: Tensor,
        prefixes: Sequence[Prefix],
        sampling: SamplingParams,
        seeds: Sequence[Sequence[int]],
    ) -> list[tuple[Completion, ...]]:
        with self._spans.span(Phase.PREFILL):
            prefix_cache, logits_BV = self._prefill(model, head_VD, prefixes)
        with self._spans.span(Phase.DECODE_TOKENS):
            first_positions = [prefix.inputs.next_position for prefix in prefixes]
            wave = _start_wave(prefix_cache, first_positions, seeds, sampling)
            token_SR, logprob_SR = self._decode(model, head_VD, wave, logits_BV, sampling)
            groups = _collect(token_SR, logprob_SR, prefix_cache.lengths, seeds, sampling, self._version)
        generated = sum(len(completion.token_ids) for group in groups for completion in group)
        self._count(tokens_generated=generated)
        return groups

    def _prefill(
        self, model: PolicyModel, head_VD: Tensor, prefixes: Sequence[Prefix]
    ) -> tuple[PrefixCache, Tensor]:
        """K/V of every prefix, and one row of logits per prefix: all its samples draw from that row."""
        lengths = [_num_rows(prefix) for prefix in prefixes]
        device = prefixes[0].embeddings_PD.device
        caches: list[PrefixCache] = []
        last_hidden: list[Tensor] = []
        for run in _runs_within(lengths, self._config.max_prefill_tokens):
            run_lengths = tuple(lengths[i] for i in run)
            states = model.decoder.prefill(
                torch.cat([prefixes[i].embeddings_PD for i in run]),
                joined_positions([prefixes[i].inputs.positions for i in run]).to(device),
                SharedPrefixLayout(prefix_lengths=run_lengths, completion_lengths=((),) * len(run)),
            )
            caches.append(PrefixCache.from_packed(states.keys, states.values, run_lengths))
            last_hidden.append(states.hidden_TD[(torch.tensor(run_lengths).cumsum(0) - 1).to(device)])
            self._count(prefixes_prefilled=len(run), prefix_rows=sum(run_lengths))
        return PrefixCache.joined(caches), _logits(torch.cat(last_hidden), head_VD)

    def _decode(
        self, model: PolicyModel, head_VD: Tensor, wave: _Wave, logits_BV: Tensor, sampling: SamplingParams
    ) -> tuple[Tensor, Tensor]:
        """Tokens and log-probs ``[S, R]`` of the wave's rows; what follows a stop token means nothing."""
        shape = (len(wave.row_S), sampling.max_new_tokens)
        stop_ids = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=logits_BV.device)
        token_S, logprob_S = _first_tokens(wave.grid, logits_BV, sampling, wave.seed_S)
        token_SR = torch.full(shape, -1, dtype=torch.int64, device=logits_BV.device)
        logprob_SR = torch.zeros(shape, dtype=logprob_S.dtype, device=logits_BV.device)
        for position in range(sampling.max_new_tokens):
            if position > 0:
                logits_SV = self._next_logits(model, head_VD, wave, token_S, position - 1)
                token_S, logprob_S = sample_tokens(logits_SV, sampling, wave.seed_S, position)
            token_SR[:, position].index_copy_(0, wave.row_S, token_S)
            logprob_SR[:, position].index_copy_(0, wave.row_S, logprob_S)
            if not sampling.stop_token_ids:
                continue
            wave.finished_S |= torch.isin(token_S, stop_ids)
            num_idle = int(wave.finished_S.count_nonzero())
            if num_idle == len(token_S):
                break
            if num_idle > 0 and num_idle >= self._config.release_idle_fraction * len(token_S):
                token_S = token_S[_release_finished(wave)]
        return token_SR, logprob_SR

    def _next_logits(
        self, model: PolicyModel, head_VD: Tensor, wave: _Wave, token_S: Tensor, own_index: int
    ) -> Tensor:
        """Feed each row its token number ``own_index`` and return the logits of the one after it."""
        attention = SharedPrefixAttention(prefix=wave.prefix, own=wave.own, grid=wave.grid)
        hidden_SD = model.decoder.decode(model.embed_tokens(token_S), wave.position_S + own_index, attention)
        wave.own.length += 1
        self._count(decode_steps=1, decode_rows=len(token_S))
        return _logits(hidden_SD, head_VD)

    def _count(self, **added: int) -> None:
        totals = {name: getattr(self._counters, name) + count for name, count in added.items()}
        self._counters = dataclasses.replace(self._counters, **totals)


def _num_rows(prefix: Prefix) -> int:
    return int(prefix.embeddings_PD.shape[0])


def _runs_within(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Consecutive indices in runs whose sizes sum to at most ``budget``; one size may exceed it, alone."""
    runs: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if not runs or size > room:
            runs.append([])
            room = budget
        runs[-1].append(index)
        room -= size
    return runs


def _logits(hidden_SD: Tensor, head_VD: Tensor) -> Tensor:
    """Float32 logits (float64 of a float64 model): bf16 logits would cost the log-probs two digits."""
    return matmul_float32(hidden_SD.to(head_VD.dtype), head_VD.mT)


def _first_tokens(
    grid: Grid, logits_BV: Tensor, sampling: SamplingParams, seed_S: Tensor
) -> tuple[Tensor, Tensor]:
    """The first token of every sample, all of a group's from the one row of its prefix."""
    shape_BW = (grid.num_groups, grid.num_slots)
    token_BW, logprob_BW = sample_tokens(logits_BV, sampling, grid.scatter(seed_S).view(shape_BW), position=0)
    return grid.gather(token_BW.flatten()), grid.gather(logprob_BW.flatten())


def _start_wave(
    prefix: PrefixCache,
    first_positions: Sequence[int],
    seeds: Sequence[Sequence[int]],
    sampling: SamplingParams,
) -> _Wave:
    device = prefix.keys[0].device
    grid = Grid.of_counts([len(group) for group in seeds], device)
    num_rows = len(grid.group_S)
    return _Wave(
        prefix=prefix,
        own=OwnCache(len(prefix.keys), max_tokens=sampling.max_new_tokens),
        grid=grid,
        row_S=torch.arange(num_rows, device=device),
        seed_S=torch.tensor([seed for group in seeds for seed in group], device=device),
        position_S=torch.tensor(first_positions, device=device)[grid.group_S],
        finished_S=torch.zeros(num_rows, dtype=torch.bool, device=device),
    )


def _release_finished(wave: _Wave) -> Tensor:
    """Drop finished rows, and the groups that have no other, from the wave; return the rows that stay."""
    stay = (~wave.finished_S).nonzero().squeeze(1)
    counts = torch.bincount(wave.grid.group_S[stay], minlength=wave.grid.num_groups).tolist()
    groups = [group for group, count in enumerate(counts) if count]
    if len(groups) < len(counts):
        wave.prefix = wave.prefix.select(groups)
    wave.grid = Grid.of_counts([counts[group] for group in groups], stay.device)
    wave.own.select(stay)
    wave.row_S, wave.seed_S = wave.row_S[stay], wave.seed_S[stay]
    wave.position_S, wave.finished_S = wave.position_S[stay], wave.finished_S[stay]
    return stay


def _collect(
    token_SR: Tensor,
    logprob_SR: Tensor,
    prefix_lengths: Sequence[int],
    seeds: Sequence[Sequence[int]],
    sampling: SamplingParams,
    version: int,
) -> list[tuple[Completion, ...]]:
    """Cut each row after its first stop token and regroup the rows."""
    stops = frozenset(sampling.stop_token_ids)
    rows = iter(zip(token_SR.tolist(), logprob_SR.tolist(), strict=True))
    if not bool(logprob_SR.isfinite().all()):
        raise FloatingPointError(
            "the model's logits are not finite during rollout; its weights or the prefix embeddings hold NaN "
            "or infinity: check the last optimizer steps (grad norm, learning rate) and the inputs"
        )

    def completion(cached_tokens: int) -> Completion:
        tokens, logprobs = next(rows)
        length = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
        return Completion(
            token_ids=tuple(tokens[:length]),
            logprobs=tuple(logprobs[:length]),
            finish_reason="stop" if tokens[length - 1] in stops else "length",
            version_spans=(VersionSpan(version=version, num_tokens=length),),
            cached_tokens=cached_tokens,
        )

    return [
        tuple(completion(length if sample else 0) for sample in range(len(group)))
        for length, group in zip(prefix_lengths, seeds, strict=True)
    ]


def _validate(
    model: PolicyModel, prefixes: Sequence[Prefix], sampling: SamplingParams, seeds: Sequence[Sequence[int]]
) -> None:
    if len(prefixes) != len(seeds):
        raise ValueError(f"got {len(prefixes)} prefixes but seeds for {len(seeds)}; pass one list per prefix")
    vocab_size, width = model.head_weight_VD.shape
    for token in sampling.stop_token_ids:
        if token >= vocab_size:
            raise ValueError(f"stop token {token} is outside the vocabulary of {vocab_size} tokens")
    longest = model.decoder.config.max_positions - sampling.max_new_tokens
    for index, (prefix, group) in enumerate(zip(prefixes, seeds, strict=True)):
        name = f"prefix {index} (prompt {prefix.inputs.prompt.prompt_id!r})"
        rows = _num_rows(prefix)
        if rows == 0 or prefix.embeddings_PD.shape[1:] != (width,):
            raise ValueError(
                f"{name} has embeddings of shape {tuple(prefix.embeddings_PD.shape)}; "
                f"expected [P, {width}] with P >= 1"
            )
        if rows > longest:
            raise ValueError(
                f"{name} has {rows} rows, and {sampling.max_new_tokens} new tokens exceed the decoder's "
                f"{model.decoder.config.max_positions} positions; shorten the prompt or lower max_new_tokens"
            )
        for seed in group:
            if not -(1 << 63) <= seed < 1 << 63:
                raise ValueError(f"seed {seed} of {name} does not fit 64 bits, signed")


@contextmanager
def _evaluating(model: PolicyModel) -> Iterator[None]:
    """Evaluation mode inside; afterwards exactly the modules that trained train again."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
