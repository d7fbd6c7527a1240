"""The native engine against each sequence alone, and what it may not do twice."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from omnigrpo.model.config import DecoderConfig
from omnigrpo.model.qwen2 import Qwen2Decoder
from omnigrpo.rollout.interface import (
    GroupRequest,
    RolloutCounters,
    RolloutEngine,
    RolloutError,
    SamplingParams,
    collect,
)
from omnigrpo.rollout.native_engine import NativeEngine, NativeEngineConfig
from omnigrpo.rollout.sampling import sample_tokens
from omnigrpo.schema import Clip, ClipFeatures, Completion, Prefix, PrefixInputs, Prompt, SharedPrefixLayout
from omnigrpo_kernels.linear_logprob import linear_logprob

VOCAB = 37
CONFIG = DecoderConfig(
    vocab_size=VOCAB, width=48, num_layers=3, num_heads=6, num_kv_heads=2, ffn_width=64, max_positions=128
)
STOPS = (19, 22, 25, 30, 31)
PREFIX_LENGTHS = (9, 1, 14, 5)
SEEDS = ([101, 102, 103], [201], [301, 302, 303, 304, 305], [401, 402])
SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=40, stop_token_ids=STOPS)


class Policy(nn.Module):
    """A decoder with a tied head."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.decoder = Qwen2Decoder(CONFIG)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in sorted(self.named_parameters()):
            if "norm" not in name:  # gain 1 per matrix, logits of a standard deviation near 2
                std = 0.3 if "embed" in name else parameter.shape[-1] ** -0.5
                nn.init.normal_(parameter, std=std, generator=generator)
        self.to(dtype)

    @property
    def head_weight_VD(self) -> Tensor:
        return self.decoder.embed_tokens.weight

    def embed_tokens(self, ids: Tensor) -> Tensor:
        return self.decoder.embed_tokens(ids)

    def dense_hidden(self, embeddings_TD: Tensor) -> Tensor:
        """Hidden rows of one sequence alone."""
        rows = embeddings_TD.shape[0]
        layout = SharedPrefixLayout(prefix_lengths=(rows,), completion_lengths=((),))
        return self.decoder(embeddings_TD, torch.arange(rows), layout)


def make_prefix(embeddings_PD: Tensor) -> Prefix:
    prompt = Prompt(prompt_id="p", clip=Clip(path=Path("p.mp4")), question="?", modalities=(), solution="x")
    inputs = PrefixInputs(
        prompt=prompt,
        token_ids_P=torch.zeros(len(embeddings_PD), dtype=torch.int64),
        question_ids=torch.zeros(1, dtype=torch.int64),
        features=ClipFeatures(vision_FND=None, audio_AD=None),
    )
    return Prefix(inputs=inputs, embeddings_PD=embeddings_PD)


def make_prefixes(dtype: torch.dtype, lengths: tuple[int, ...] = PREFIX_LENGTHS) -> list[Prefix]:
    generator = torch.Generator().manual_seed(5)
    return [make_prefix(torch.randn(rows, CONFIG.width, generator=generator).to(dtype)) for rows in lengths]


def requests_for(prefixes: Sequence[Prefix], seeds: Sequence[Sequence[int]]) -> list[GroupRequest]:
    return [GroupRequest(prefix=p, seeds=tuple(group)) for p, group in zip(prefixes, seeds, strict=True)]


def generate(
    engine: RolloutEngine,
    prefixes: Sequence[Prefix],
    sampling: SamplingParams,
    seeds: Sequence[Sequence[int]],
) -> list[tuple[Completion, ...]]:
    return collect(engine.generate(requests_for(prefixes, seeds), sampling), len(prefixes))


@torch.no_grad()
def dense_generate(
    model: Policy, prefix: Prefix, sampling: SamplingParams, seed: int
) -> tuple[list[int], list[float]]:
    """One sample alone, a full forward pass per token."""
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < sampling.max_new_tokens and not (tokens and tokens[-1] in sampling.stop_token_ids):
        own_RD = model.embed_tokens(torch.tensor(tokens, dtype=torch.int64))
        hidden_TD = model.dense_hidden(torch.cat([prefix.embeddings_PD, own_RD]))
        logits_1V = hidden_TD[-1:] @ model.head_weight_VD.T
        token, logprob = sample_tokens(logits_1V, sampling, torch.tensor([seed]), len(tokens))
        tokens.append(int(token))
        logprobs.append(float(logprob))
    return tokens, logprobs


def assert_dense(
    model: Policy,
    prefix: Prefix,
    sampling: SamplingParams,
    seed: int,
    completion: Completion,
    tolerance: float,
) -> None:
    tokens, logprobs = dense_generate(model, prefix, sampling, seed)
    assert list(completion.token_ids) == tokens
    assert completion.logprobs == pytest.approx(logprobs, rel=0, abs=tolerance)
    assert completion.finish_reason == ("stop" if tokens[-1] in sampling.stop_token_ids else "length")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(torch.float64)


@dataclass(frozen=True, kw_only=True)
class Case:
    sampling: SamplingParams = SAMPLING
    engine: NativeEngineConfig = field(default_factory=NativeEngineConfig)


CASES = {
    "defaults": Case(),
    "looks_now_and_then": Case(engine=NativeEngineConfig(steps_between_looks=4)),
    "groups_join_later": Case(engine=NativeEngineConfig(max_decode_rows=6)),
    "join_later_and_looks_now_and_then": Case(
        engine=NativeEngineConfig(max_decode_rows=6, steps_between_looks=3)
    ),
    "one_group_at_a_time": Case(engine=NativeEngineConfig(max_decode_rows=1)),
    "prefill_in_pieces": Case(engine=NativeEngineConfig(max_prefill_tokens=10)),
    "greedy": Case(sampling=replace(SAMPLING, temperature=0.0)),
    "truncated_and_hot": Case(sampling=replace(SAMPLING, temperature=1.4, top_k=12, top_p=0.9)),
    "no_stop_tokens": Case(sampling=replace(SAMPLING, stop_token_ids=(), max_new_tokens=34)),
    "one_token": Case(sampling=replace(SAMPLING, max_new_tokens=1)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)
def test_every_sample_equals_its_sequence_alone(case: Case, dtype: torch.dtype, tolerance: float):
    model = Policy(dtype)
    prefixes = make_prefixes(dtype)
    groups = generate(NativeEngine(model, case.engine), prefixes, case.sampling, SEEDS)
    assert [len(group) for group in groups] == [3, 1, 5, 2]
    for prefix, seeds, group in zip(prefixes, SEEDS, groups, strict=True):
        for seed, completion in zip(seeds, group, strict=True):
            assert_dense(model, prefix, case.sampling, seed, completion, tolerance)


def test_samples_of_three_row_positions_equal_their_sequences_alone(monkeypatch: pytest.MonkeyPatch):
    """A prefix whose positions end below its length, beside one that counts its rows."""
    monkeypatch.setitem(globals(), "CONFIG", replace(CONFIG, mrope_section=(1, 1, 2)))
    model = Policy(torch.float64)
    grid, plain = make_prefixes(torch.float64, (9, 5))
    at = torch.arange(9)
    positions_3P = torch.stack([at // 3, at // 2, at % 3])
    grid = replace(grid, inputs=replace(grid.inputs, positions_3P=positions_3P))
    sampling = replace(SAMPLING, stop_token_ids=(), max_new_tokens=6)
    (completion,), (other,) = generate(NativeEngine(model), [grid, plain], sampling, [[1], [2]])

    ids = torch.tensor(completion.token_ids)
    rows = torch.cat([grid.embeddings_PD, model.embed_tokens(ids)])
    positions = torch.cat([positions_3P, (torch.arange(6) + 5).expand(3, -1)], dim=1)
    hidden = model.decoder(
        rows, positions, SharedPrefixLayout(prefix_lengths=(15,), completion_lengths=((),))
    )
    logprob = linear_logprob(hidden[8:-1], model.head_weight_VD, ids).logprob_T
    assert completion.logprobs == pytest.approx(logprob.tolist(), rel=0, abs=1e-9)
    assert_dense(model, plain, sampling, 2, other, 1e-9)


def test_the_comparison_covers_early_stops_full_length_and_released_rows(policy: Policy):
    """Guards the test above: its default case must meet every path."""
    engine = NativeEngine(policy)
    groups = generate(engine, make_prefixes(torch.float64), SAMPLING, SEEDS)
    lengths = [len(completion.token_ids) for group in groups for completion in group]
    assert min(lengths) < 5
    assert len(set(lengths)) >= 5
    assert {completion.finish_reason for group in groups for completion in group} == {"stop", "length"}
    per_group = [max(len(completion.token_ids) for completion in group) for group in groups]
    assert min(per_group) < max(per_group)  # a whole group is dropped before the others end


def test_bfloat16_runs_and_stays_near_its_own_dense_logprobs():
    model = Policy(torch.bfloat16)
    prefixes = make_prefixes(torch.bfloat16)
    groups = generate(NativeEngine(model), prefixes, SAMPLING, SEEDS)
    for prefix, group in zip(prefixes, groups, strict=True):
        for completion in group:
            expected = trainer_logprobs(model, prefix, completion, temperature=1.0)
            difference = (torch.tensor(completion.logprobs) - expected).abs()
            assert float(difference.mean()) < 0.05


@torch.no_grad()
def trainer_logprobs(model: Policy, prefix: Prefix, completion: Completion, temperature: float) -> Tensor:
    """What the update computes for the same tokens."""
    ids = torch.tensor(completion.token_ids)
    rows, new = len(prefix.embeddings_PD), len(ids)
    layout = SharedPrefixLayout(prefix_lengths=(rows,), completion_lengths=((new,),))
    embeddings_TD = torch.cat([prefix.embeddings_PD, model.embed_tokens(ids)])
    hidden_TD = model.decoder(embeddings_TD, torch.arange(rows + new), layout)
    predictors_RD = hidden_TD[rows - 1 : rows + new - 1]
    return linear_logprob(predictors_RD, model.head_weight_VD, ids, temperature=temperature).logprob_T


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_reported_logprobs_equal_the_trainers(policy: Policy, temperature: float):
    sampling = replace(SAMPLING, temperature=temperature, top_k=10)
    prefixes = make_prefixes(torch.float64)
    for prefix, group in zip(
        prefixes, generate(NativeEngine(policy), prefixes, sampling, SEEDS), strict=True
    ):
        for completion in group:
            expected = trainer_logprobs(policy, prefix, completion, temperature)
            assert completion.logprobs == pytest.approx(expected.tolist(), rel=0, abs=1e-9)


@contextmanager
def rows_through_first_layer(model: Policy) -> Iterator[list[int]]:
    rows: list[int] = []
    hook = model.get_submodule("decoder.layers.0.mlp").register_forward_hook(
        lambda _module, inputs, _output: rows.append(inputs[0].shape[0])
    )
    try:
        yield rows
    finally:
        hook.remove()


def test_each_prefix_is_prefilled_once_whatever_the_group_size(policy: Policy):
    engine = NativeEngine(policy)
    with rows_through_first_layer(policy) as rows:
        groups = generate(engine, make_prefixes(torch.float64), SAMPLING, SEEDS)
    assert rows[0] == sum(PREFIX_LENGTHS)
    counters = engine.counters
    assert counters.prefixes_prefilled == len(PREFIX_LENGTHS)
    assert counters.prefix_rows == sum(PREFIX_LENGTHS)
    assert counters.decode_steps == len(rows) - 1
    assert counters.decode_rows == sum(rows[1:])
    assert max(rows[1:]) <= sum(len(seeds) for seeds in SEEDS)
    assert counters.tokens_generated == sum(len(item.token_ids) for group in groups for item in group)
    assert [[item.cached_tokens for item in group] for group in groups] == [
        [0] + [length] * (len(seeds) - 1) for length, seeds in zip(PREFIX_LENGTHS, SEEDS, strict=True)
    ]


def test_released_rows_are_not_computed_again(policy: Policy):
    engine = NativeEngine(policy)
    groups = generate(engine, make_prefixes(torch.float64), SAMPLING, SEEDS)
    completions = [completion for group in groups for completion in group]
    # The first token comes from prefill, and the last one is never fed back.
    assert engine.counters.decode_rows == sum(len(item.token_ids) - 1 for item in completions)
    assert engine.counters.decode_steps == max(len(item.token_ids) for item in completions) - 1


def test_counters_add_up_and_subtract(policy: Policy):
    engine = NativeEngine(policy)
    generate(engine, make_prefixes(torch.float64), SAMPLING, SEEDS)
    first = engine.counters
    generate(engine, make_prefixes(torch.float64), SAMPLING, SEEDS)
    assert engine.counters.since(first) == first
    assert first.since(RolloutCounters()) == first


def test_a_sample_depends_on_its_seed_alone_not_on_its_batch(policy: Policy):
    prefixes = make_prefixes(torch.float64)
    together = generate(NativeEngine(policy), prefixes, SAMPLING, SEEDS)
    backwards = generate(
        NativeEngine(policy, NativeEngineConfig(max_decode_rows=4)),
        prefixes[::-1],
        SAMPLING,
        [list(seeds)[::-1] for seeds in SEEDS[::-1]],
    )
    alone = [
        generate(NativeEngine(policy), [prefix], SAMPLING, [[seed]])[0][0].token_ids
        for prefix, seeds in zip(prefixes, SEEDS, strict=True)
        for seed in seeds
    ]
    flat = [completion.token_ids for group in together for completion in group]
    assert flat == alone
    assert [item.token_ids for group in backwards for item in group][::-1] == alone
    assert len(set(flat)) > 6


def test_prefix_without_seeds_costs_nothing(policy: Policy):
    engine = NativeEngine(policy)
    prefixes = make_prefixes(torch.float64)
    groups = generate(engine, prefixes[:2], SAMPLING, [[], [7]])
    assert [len(group) for group in groups] == [0, 1]
    assert engine.counters.prefix_rows == PREFIX_LENGTHS[1]
    assert generate(engine, [], SAMPLING, []) == []


def test_publish_names_the_weights_and_they_are_the_models_own():
    model = Policy(torch.float64)
    prefixes = make_prefixes(torch.float64)
    engine: RolloutEngine = NativeEngine(model)
    before = generate(engine, prefixes, SAMPLING, SEEDS)
    assert {item.version_spans[0].version for group in before for item in group} == {0}
    with torch.no_grad():
        model.decoder.embed_tokens.weight.mul_(0.5)
    engine.publish([], 8)
    after = generate(engine, prefixes, SAMPLING, SEEDS)
    assert {item.version_spans[0].version for group in after for item in group} == {8}
    assert after[0][0].logprobs != before[0][0].logprobs
    assert_dense(model, prefixes[0], SAMPLING, SEEDS[0][0], after[0][0], 1e-9)


def test_no_gradient_is_recorded_and_modes_are_restored():
    model = Policy(torch.float64)
    model.train()
    model.decoder.layers[1].eval()
    modes = [module.training for module in model.modules()]
    during: list[bool] = []
    hook = model.decoder.layers[0].register_forward_hook(
        lambda module, _inputs, output: during.append(module.training or output.requires_grad)
    )
    generate(NativeEngine(model), make_prefixes(torch.float64), SAMPLING, SEEDS)
    hook.remove()
    assert during
    assert not any(during)
    assert [module.training for module in model.modules()] == modes
    hidden_TD = model.dense_hidden(make_prefixes(torch.float64)[0].embeddings_PD)
    hidden_TD.sum().backward()  # nothing that generation left behind spoils the next backward


class RecordingSpans:
    def __init__(self) -> None:
        self.names: list[str] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self.names.append(str(name))
        yield


def test_phases_are_reported(policy: Policy):
    spans = RecordingSpans()
    generate(
        NativeEngine(policy, NativeEngineConfig(max_decode_rows=6), spans=spans),
        make_prefixes(torch.float64),
        SAMPLING,
        SEEDS,
    )
    assert set(spans.names) == {"prefill", "decode_tokens"}
    assert spans.names[0] == "prefill"
    assert 2 <= spans.names.count("prefill") <= len(SEEDS)


@pytest.mark.parametrize(
    ("lengths", "sampling", "seeds", "message"),
    [
        ((5, 90), SAMPLING, [[1], [2]], r"prefix 1 .*90 rows, and 40 new tokens exceed .* 128 positions"),
        ((0,), SAMPLING, [[1]], r"shape \(0, 48\)"),
        ((5,), SAMPLING, [[1 << 63]], "does not fit 64 bits"),
        ((5,), replace(SAMPLING, stop_token_ids=(VOCAB,)), [[1]], "stop token 37 is outside the vocabulary"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(
    policy: Policy, lengths: tuple[int, ...], sampling: SamplingParams, seeds: list[list[int]], message: str
):
    engine = NativeEngine(policy)
    with pytest.raises(ValueError, match=message):
        generate(engine, make_prefixes(torch.float64, lengths), sampling, seeds)
    assert engine.counters == RolloutCounters()


def test_longest_prompt_that_fits_is_served(policy: Policy):
    prefix = make_prefixes(torch.float64, (128 - 40,))
    [[completion]] = generate(NativeEngine(policy), prefix, replace(SAMPLING, stop_token_ids=()), [[1]])
    assert len(completion.token_ids) == 40


def test_logits_that_are_not_finite_are_an_error():
    model = Policy(torch.float64)
    with torch.no_grad():
        model.decoder.norm.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite during rollout"):
        generate(NativeEngine(model), make_prefixes(torch.float64), SAMPLING, SEEDS)


def test_logits_that_are_not_finite_name_the_prompt_and_leave_no_stream(policy: Policy):
    good, bad = make_prefixes(torch.float64, (4, 5))
    bad = replace(bad, embeddings_PD=bad.embeddings_PD * torch.nan)
    bad = replace(bad, inputs=replace(bad.inputs, prompt=replace(bad.inputs.prompt, prompt_id="broken")))
    engine = NativeEngine(policy)
    with pytest.raises(FloatingPointError, match="'broken'"):
        generate(engine, [good, bad], SAMPLING, [[1], [2]])
    engine.release_memory()


def test_a_group_is_handed_out_when_its_last_sample_ends(policy: Policy):
    prefixes, sampling = make_prefixes(torch.float64), replace(SAMPLING, max_new_tokens=30)
    lengths = [
        max(len(c.token_ids) for c in group)
        for group in generate(NativeEngine(policy), prefixes, sampling, SEEDS)
    ]
    engine = NativeEngine(policy)
    stream = engine.generate(requests_for(prefixes, SEEDS), sampling)
    order = []
    for group in stream:
        order.append(group.index)
        assert engine.counters.decode_steps == lengths[group.index] - 1
    assert [lengths[index] for index in order] == sorted(lengths)


def test_a_waiting_group_joins_as_soon_as_rows_are_free(policy: Policy):
    prefixes = make_prefixes(torch.float64)
    everything = generate(NativeEngine(policy), prefixes, SAMPLING, SEEDS)
    steps = [max(len(c.token_ids) for c in group) - 1 for group in everything]
    engine = NativeEngine(policy, NativeEngineConfig(max_decode_rows=6))
    assert generate(engine, prefixes, SAMPLING, SEEDS) == everything
    assert max(steps) < engine.counters.decode_steps < sum(steps)
    assert engine.counters.prefixes_prefilled == len(SEEDS)


def finished_in_pieces(
    engine: RolloutEngine, prefixes: Sequence[Prefix], sampling: SamplingParams, budget: int
) -> tuple[list[tuple[Completion, ...]], int]:
    """Calls of at most ``budget`` new tokens a sample until all have ended, and the number of calls."""
    begun: list[tuple[Completion | None, ...]] = [(None,) * len(seeds) for seeds in SEEDS]
    requests = requests_for(prefixes, SEEDS)
    for call in range(1, 100):
        engine.publish([], call)
        continued = [replace(r, begun=b) for r, b in zip(requests, begun, strict=True)]
        groups = collect(engine.generate(continued, replace(sampling, token_budget=budget)), len(requests))
        if all(c.is_finished for group in groups for c in group):
            return groups, call
        begun = [tuple(group) for group in groups]
    raise AssertionError("the samples never end")


@pytest.mark.parametrize("budget", [1, 7, 33])
@pytest.mark.parametrize(
    "config",
    [
        NativeEngineConfig(),
        NativeEngineConfig(max_decode_rows=6, max_prefill_tokens=12, steps_between_looks=3),
    ],
    ids=["together", "in_turn"],
)
def test_budget_and_continuing_give_what_one_call_gives(
    policy: Policy, budget: int, config: NativeEngineConfig
):
    prefixes = make_prefixes(torch.float64)
    sampling = replace(SAMPLING, max_new_tokens=12 if budget == 1 else 40)
    whole = generate(NativeEngine(policy), prefixes, sampling, SEEDS)
    pieces, calls = finished_in_pieces(NativeEngine(policy, config), prefixes, sampling, budget)
    longest = max(len(c.token_ids) for group in whole for c in group)
    assert calls == -(-longest // budget)
    for expected, found in zip(
        (c for group in whole for c in group), (c for group in pieces for c in group), strict=True
    ):
        assert found.token_ids == expected.token_ids
        assert found.logprobs == pytest.approx(expected.logprobs, rel=0, abs=1e-9)
        assert found.finish_reason == expected.finish_reason
        length = len(found.token_ids)
        sizes = [min(budget, length - start) for start in range(0, length, budget)]
        assert [(s.version, s.num_tokens) for s in found.version_spans] == list(enumerate(sizes, start=1))


def test_what_a_budget_cuts_says_so_and_finished_ones_are_handed_back(policy: Policy):
    prefixes, engine = make_prefixes(torch.float64), NativeEngine(policy)
    cut = generate(engine, prefixes, replace(SAMPLING, token_budget=5), SEEDS)
    reasons = [c.finish_reason for group in cut for c in group]
    assert {"budget", "stop"} == set(reasons)
    assert all(len(c.token_ids) == 5 for group in cut for c in group if c.finish_reason == "budget")
    requests = [replace(r, begun=b) for r, b in zip(requests_for(prefixes, SEEDS), cut, strict=True)]
    before = engine.counters
    done = collect(engine.generate(requests, SAMPLING), len(requests))
    for old, new in zip((c for g in cut for c in g), (c for g in done for c in g), strict=True):
        assert new is old if old.is_finished else new.token_ids[:5] == old.token_ids
    assert engine.counters.since(before).tokens_generated == sum(
        len(new.token_ids) - len(old.token_ids)
        for before_group, group in zip(cut, done, strict=True)
        for old, new in zip(before_group, group, strict=True)
    )


def test_a_begun_completion_at_its_longest_ends_without_work(policy: Policy):
    prefixes, engine = make_prefixes(torch.float64, (9,)), NativeEngine(policy)
    sampling = replace(SAMPLING, stop_token_ids=(), token_budget=6)
    [[begun]] = generate(engine, prefixes, sampling, [[1]])
    before = engine.counters
    request = GroupRequest(prefix=prefixes[0], seeds=(1,), begun=(begun,))
    [[ended]] = collect(engine.generate([request], replace(sampling, max_new_tokens=6)), 1)
    assert ended == replace(begun, finish_reason="length", cached_tokens=0)
    assert engine.counters == before


def test_a_paused_engine_refuses_to_be_read_and_goes_on_after_resume(policy: Policy):
    prefixes = make_prefixes(torch.float64)
    expected = generate(NativeEngine(policy), prefixes, SAMPLING, SEEDS)
    engine = NativeEngine(policy)
    stream = engine.generate(requests_for(prefixes, SEEDS), SAMPLING)
    first = next(stream)
    engine.pause()
    with pytest.raises(RolloutError, match="paused"):
        next(stream)
    engine.resume()
    rest = {group.index: group.completions for group in (first, *stream)}
    assert [rest[index] for index in range(len(SEEDS))] == expected


def test_memory_is_released_between_streams_alone(policy: Policy):
    prefixes, engine = make_prefixes(torch.float64), NativeEngine(policy)
    expected = generate(engine, prefixes, SAMPLING, SEEDS)
    stream = engine.generate(requests_for(prefixes, SEEDS), SAMPLING)
    next(stream)
    with pytest.raises(RolloutError, match="under way"):
        engine.release_memory()
    stream.close()
    assert list(stream) == []
    engine.release_memory()
    engine.restore_memory()
    assert generate(engine, prefixes, SAMPLING, SEEDS) == expected


def test_blocks_come_back_at_the_end_and_when_a_stream_is_dropped(policy: Policy):
    prefixes, engine = make_prefixes(torch.float64), NativeEngine(policy)
    generate(engine, prefixes, SAMPLING, SEEDS)
    pool = engine.pool
    assert pool is not None
    free = pool.num_free
    assert free == pool.num_blocks - 1  # all but the dump block
    stream = engine.generate(requests_for(prefixes, SEEDS), SAMPLING)
    next(stream)
    assert pool.num_free < free
    del stream
    gc.collect()
    assert pool.num_free == free
    engine.release_memory()


def test_the_pool_grows_under_live_rows(policy: Policy):
    """70 prefixes of a block each do not fit the first 64 blocks."""
    prefixes = make_prefixes(torch.float64, (3,) * 70)
    seeds, sampling = [[seed] for seed in range(70)], replace(SAMPLING, max_new_tokens=4)
    engine = NativeEngine(policy, NativeEngineConfig(max_prefill_tokens=30))
    groups = generate(engine, prefixes, sampling, seeds)
    assert engine.pool is not None
    assert engine.pool.num_blocks >= 128
    for index in (0, 40, 69):
        assert_dense(policy, prefixes[index], sampling, index, groups[index][0], 1e-9)


def test_weights_published_under_way_show_in_the_spans(policy: Policy):
    engine = NativeEngine(policy)
    sampling = replace(SAMPLING, stop_token_ids=())
    requests = requests_for(make_prefixes(torch.float64, (5, 6)), [[1], [2]])
    requests[0] = replace(requests[0], begun=(half_done(engine, requests[0], sampling),))
    stream = engine.generate(requests, sampling)
    assert next(stream).index == 0
    engine.publish([], 3)
    (late,) = next(stream).completions
    assert [(s.version, s.num_tokens) for s in late.version_spans] == [(0, 20), (3, 20)]


def half_done(engine: NativeEngine, request: GroupRequest, sampling: SamplingParams) -> Completion:
    [[begun]] = collect(engine.generate([request], replace(sampling, token_budget=20)), 1)
    return begun


@pytest.mark.gpu
def test_captured_graphs_draw_what_single_launches_draw():
    drawn = {}
    for cuda_graphs in (True, False):
        model = Policy(torch.float32).cuda()
        prefixes = [replace(p, embeddings_PD=p.embeddings_PD.cuda()) for p in make_prefixes(torch.float32)]
        config = NativeEngineConfig(cuda_graphs=cuda_graphs, max_decode_rows=6, steps_between_looks=3)
        drawn[cuda_graphs] = generate(NativeEngine(model, config), prefixes, SAMPLING, SEEDS)
    assert drawn[True] == drawn[False]


def test_closed_engine_says_so(policy: Policy):
    engine = NativeEngine(policy)
    engine.close()
    with pytest.raises(RolloutError, match="closed"):
        generate(engine, make_prefixes(torch.float64), SAMPLING, SEEDS)


def test_a_stream_of_a_closed_engine_has_ended(policy: Policy):
    engine = NativeEngine(policy)
    stream = engine.generate(requests_for(make_prefixes(torch.float64), SEEDS), SAMPLING)
    next(stream)
    engine.close()
    assert list(stream) == []


@pytest.mark.parametrize("field", ["max_prefill_tokens", "max_decode_rows", "steps_between_looks"])
def test_engine_config_names_the_wrong_field(field: str):
    with pytest.raises(ValueError, match=field):
        replace(NativeEngineConfig(), **{field: 0})
