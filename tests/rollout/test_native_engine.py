"""The native engine against each sequence alone, and what it may not do twice."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from omnigrpo.model.config import DecoderConfig
from omnigrpo.model.qwen2 import Qwen2Decoder
from omnigrpo.rollout.interface import RolloutCounters, RolloutEngine, SamplingParams
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
    "release_at_once": Case(engine=NativeEngineConfig(release_idle_fraction=0)),
    "never_release": Case(engine=NativeEngineConfig(release_idle_fraction=1)),
    "waves": Case(engine=NativeEngineConfig(max_decode_rows=6)),
    "one_group_per_wave": Case(engine=NativeEngineConfig(max_decode_rows=1)),
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
    groups = NativeEngine(model, case.engine).generate(prefixes, case.sampling, SEEDS)
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
    (completion,), (other,) = NativeEngine(model).generate([grid, plain], sampling, [[1], [2]])

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
    engine = NativeEngine(policy, NativeEngineConfig(release_idle_fraction=0))
    groups = engine.generate(make_prefixes(torch.float64), SAMPLING, SEEDS)
    lengths = [len(completion.token_ids) for group in groups for completion in group]
    assert min(lengths) < 5
    assert len(set(lengths)) >= 5
    assert {completion.finish_reason for group in groups for completion in group} == {"stop", "length"}
    per_group = [max(len(completion.token_ids) for completion in group) for group in groups]
    assert min(per_group) < max(per_group)  # a whole group is dropped before the others end


def test_bfloat16_runs_and_stays_near_its_own_dense_logprobs():
    model = Policy(torch.bfloat16)
    prefixes = make_prefixes(torch.bfloat16)
    groups = NativeEngine(model).generate(prefixes, SAMPLING, SEEDS)
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
    for prefix, group in zip(prefixes, NativeEngine(policy).generate(prefixes, sampling, SEEDS), strict=True):
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
        groups = engine.generate(make_prefixes(torch.float64), SAMPLING, SEEDS)
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
    engine = NativeEngine(policy, NativeEngineConfig(release_idle_fraction=0))
    groups = engine.generate(make_prefixes(torch.float64), SAMPLING, SEEDS)
    completions = [completion for group in groups for completion in group]
    # The first token comes from prefill, and the last one is never fed back.
    assert engine.counters.decode_rows == sum(len(item.token_ids) - 1 for item in completions)
    assert engine.counters.decode_steps == max(len(item.token_ids) for item in completions) - 1


def test_counters_add_up_and_subtract(policy: Policy):
    engine = NativeEngine(policy)
    engine.generate(make_prefixes(torch.float64), SAMPLING, SEEDS)
    first = engine.counters
    engine.generate(make_prefixes(torch.float64), SAMPLING, SEEDS)
    assert engine.counters.since(first) == first
    assert first.since(RolloutCounters()) == first


def test_a_sample_depends_on_its_seed_alone_not_on_its_batch(policy: Policy):
    prefixes = make_prefixes(torch.float64)
    together = NativeEngine(policy).generate(prefixes, SAMPLING, SEEDS)
    backwards = NativeEngine(policy, NativeEngineConfig(max_decode_rows=4)).generate(
        prefixes[::-1], SAMPLING, [list(seeds)[::-1] for seeds in SEEDS[::-1]]
    )
    alone = [
        NativeEngine(policy).generate([prefix], SAMPLING, [[seed]])[0][0].token_ids
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
    groups = engine.generate(prefixes[:2], SAMPLING, [[], [7]])
    assert [len(group) for group in groups] == [0, 1]
    assert engine.counters.prefix_rows == PREFIX_LENGTHS[1]
    assert engine.generate([], SAMPLING, []) == []


def test_publish_names_the_weights_and_they_are_the_models_own():
    model = Policy(torch.float64)
    prefixes = make_prefixes(torch.float64)
    engine: RolloutEngine = NativeEngine(model)
    before = engine.generate(prefixes, SAMPLING, SEEDS)
    assert {item.weight_version for group in before for item in group} == {0}
    with torch.no_grad():
        model.decoder.embed_tokens.weight.mul_(0.5)
    engine.publish(8)
    after = engine.generate(prefixes, SAMPLING, SEEDS)
    assert {item.weight_version for group in after for item in group} == {8}
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
    NativeEngine(model).generate(make_prefixes(torch.float64), SAMPLING, SEEDS)
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
    NativeEngine(policy, NativeEngineConfig(max_decode_rows=6), spans=spans).generate(
        make_prefixes(torch.float64), SAMPLING, SEEDS
    )
    assert spans.names == ["prefill", "decode_tokens"] * 2


@pytest.mark.parametrize(
    ("lengths", "sampling", "seeds", "message"),
    [
        ((5, 90), SAMPLING, [[1], [2]], r"prefix 1 .*90 rows, and 40 new tokens exceed .* 128 positions"),
        ((5,), SAMPLING, [[1], [2]], "got 1 prefixes but seeds for 2"),
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
        engine.generate(make_prefixes(torch.float64, lengths), sampling, seeds)
    assert engine.counters == RolloutCounters()


def test_longest_prompt_that_fits_is_served(policy: Policy):
    prefix = make_prefixes(torch.float64, (128 - 40,))
    [[completion]] = NativeEngine(policy).generate(prefix, replace(SAMPLING, stop_token_ids=()), [[1]])
    assert len(completion.token_ids) == 40


def test_logits_that_are_not_finite_are_an_error():
    model = Policy(torch.float64)
    with torch.no_grad():
        model.decoder.norm.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite during rollout"):
        NativeEngine(model).generate(make_prefixes(torch.float64), SAMPLING, SEEDS)


def test_closed_engine_says_so(policy: Policy):
    engine = NativeEngine(policy)
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate(make_prefixes(torch.float64), SAMPLING, SEEDS)


@pytest.mark.parametrize("field", ["max_prefill_tokens", "max_decode_rows"])
def test_engine_config_names_the_wrong_field(field: str):
    with pytest.raises(ValueError, match=field):
        replace(NativeEngineConfig(), **{field: 0})
