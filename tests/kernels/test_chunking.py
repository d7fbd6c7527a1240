from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from omnigrpo_kernels import chunking
from omnigrpo_kernels.chunking import TokenChunk, token_chunks

VOCABULARY, WIDTH = 50, 3
ROWS_MULTIPLE = chunking.ROWS_MULTIPLE["cpu"]


def chunks_of(
    num_tokens: int,
    limit_rows: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    rows_C: Tensor | None = None,
    keep_whole_C: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[TokenChunk], Tensor, Tensor]:
    """Chunks, hidden states and targets; ``limit_rows`` rows of exponentials fit the budget, and almost another."""
    row_bytes = VOCABULARY * dtype.itemsize
    monkeypatch.setattr(chunking, "CHUNK_BYTES", {"cpu": (limit_rows + 1) * row_bytes - 1})
    num_rows = num_tokens if rows_C is None else int(rows_C.max()) + 2
    hidden_RD = torch.randn(num_rows, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets_C = torch.arange(num_tokens) * 7 % VOCABULARY
    weight_VD = torch.zeros(VOCABULARY, WIDTH, dtype=dtype)
    chunks = list(token_chunks(hidden_RD, weight_VD, targets_C, rows_C, keep_whole_C))
    return chunks, hidden_RD, targets_C


def ends(chunks: Iterable[TokenChunk]) -> list[int]:
    """Ends of the chunks, which must follow each other from the first token on."""
    found = [0]
    for chunk in chunks:
        assert chunk.tokens.start == found[-1]
        found.append(chunk.tokens.stop)
    return found[1:]


@pytest.mark.parametrize(
    ("num_tokens", "limit_rows", "expected"),
    [
        (0, 4, []),
        (1, 4, [1]),
        (4, 4, [4]),
        (5, 4, [3, 5]),
        (10, 4, [4, 8, 10]),
        (3, 1, [1, 2, 3]),
        (3, 0, [1, 2, 3]),
        (100, 64, [64, 100]),
        (100, 63, [63, 100]),
        (130, 100, [96, 130]),
        (320, 100, [96, 192, 288, 320]),
        (1000, 1000, [1000]),
    ],
)
def test_chunks_are_even_whole_panels_and_fit_the_budget(
    num_tokens: int, limit_rows: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ends(chunks_of(num_tokens, limit_rows, monkeypatch)[0]) == expected


@pytest.mark.parametrize("num_tokens", [1, 31, 33, 96, 97, 500])
@pytest.mark.parametrize("limit_rows", [1, 7, 31, 32, 33, 63, 65, 100])
def test_every_chunk_fits_the_budget_and_there_are_few(
    num_tokens: int, limit_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks, _, _ = chunks_of(num_tokens, limit_rows, monkeypatch)
    sizes = [len(chunk.hidden_TD) for chunk in chunks]
    assert ends(chunks)[-1] == num_tokens
    assert max(sizes) <= limit_rows
    assert len(chunks) <= -(-num_tokens // limit_rows) + num_tokens // ROWS_MULTIPLE
    if len(chunks) > 1 and sizes[0] > ROWS_MULTIPLE and sizes[0] != limit_rows:
        assert sizes[0] % ROWS_MULTIPLE == 0


def test_large_pass_is_cut_in_two_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "WHOLE_BYTES", {"cpu": 256 * VOCABULARY * 4})
    assert ends(chunks_of(256, 1000, monkeypatch)[0]) == [256]
    assert ends(chunks_of(257, 1000, monkeypatch)[0]) == [160, 257]
    assert ends(chunks_of(300, 100, monkeypatch)[0]) == [100, 200, 300]


def test_pass_that_keeps_nothing_has_a_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "CHUNK_BYTES", {"cpu": 1})
    monkeypatch.setattr(chunking, "WHOLE_BYTES", {"cpu": 1})
    monkeypatch.setattr(chunking, "FORWARD_ROWS", 8)
    hidden_RD, weight_VD, targets_C = torch.zeros(10, 1), torch.zeros(VOCABULARY, 1), torch.arange(10)
    assert ends(token_chunks(hidden_RD, weight_VD, targets_C, None, keep=False)) == [5, 10]
    assert ends(token_chunks(hidden_RD[:8], weight_VD, targets_C[:8], None, keep=False)) == [8]


def test_budget_counts_the_inputs_own_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "CHUNK_BYTES", {"cpu": 8 * VOCABULARY * 2})
    targets_C = torch.zeros(8, dtype=torch.int64)
    for dtype, expected in ((torch.bfloat16, [8]), (torch.float32, [4, 8]), (torch.float64, [2, 4, 6, 8])):
        hidden_RD, weight_VD = (torch.zeros(size, WIDTH, dtype=dtype) for size in (8, VOCABULARY))
        assert ends(token_chunks(hidden_RD, weight_VD, targets_C, None)) == expected


def test_device_without_a_budget_of_its_own_takes_the_cpus() -> None:
    hidden_RD, weight_VD = (torch.empty(size, WIDTH, device="meta") for size in (9, VOCABULARY))
    targets_C = torch.empty(9, dtype=torch.int64, device="meta")
    assert ends(token_chunks(hidden_RD, weight_VD, targets_C, None)) == [9]


def test_chunk_of_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, hidden_RD, targets_C = chunks_of(10, 4, monkeypatch)
    for chunk in chunks:
        assert torch.equal(chunk.hidden_TD, hidden_RD[chunk.tokens])
        assert torch.equal(chunk.pairs.targets_U, targets_C[chunk.tokens])
        assert chunk.pairs.pair_C is None
        assert chunk.rows_T == chunk.tokens


def test_strided_hidden_states_become_contiguous_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "CHUNK_BYTES", {"cpu": 4 * VOCABULARY * 4})
    hidden_RD = torch.randn(WIDTH, 20).T[::2]
    chunks = list(token_chunks(hidden_RD, torch.zeros(VOCABULARY, WIDTH), torch.arange(20)[::2], None))
    assert all(chunk.hidden_TD.is_contiguous() and chunk.pairs.targets_U.is_contiguous() for chunk in chunks)
    assert torch.equal(torch.cat([chunk.hidden_TD for chunk in chunks]), hidden_RD)


ROWS = torch.tensor([6, 6, 1, 0, 6, 6, 2, 1, 5, 6])
"""Row 6 predicts five tokens, in every chunk of four; rows 3 and 4 and the last none."""


def test_chunk_of_shared_rows_holds_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, hidden_RD, targets_C = chunks_of(10, 4, monkeypatch, rows_C=ROWS)
    assert ends(chunks) == [4, 8, 10]
    for chunk, rows in zip(chunks, ([0, 1, 6], [1, 2, 6], [5, 6]), strict=True):
        assert isinstance(chunk.rows_T, Tensor)
        assert chunk.rows_T.tolist() == rows
        assert torch.equal(chunk.hidden_TD, hidden_RD[rows])
        assert chunk.pairs.pair_C is not None
        predicted = list(
            zip(
                chunk.rows_T[chunk.pairs.rows_U[chunk.pairs.pair_C]].tolist(),
                chunk.pairs.of_tokens(chunk.pairs.targets_U).tolist(),
                strict=True,
            )
        )
        given = zip(ROWS[chunk.tokens].tolist(), targets_C[chunk.tokens].tolist(), strict=True)
        assert predicted == list(given)


@pytest.mark.parametrize("rows_C", [None, ROWS], ids=["own rows", "shared rows"])
def test_gradients_of_chunks_add_up(rows_C: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, hidden_RD, _ = chunks_of(10, 4, monkeypatch, rows_C=rows_C)
    grad_RD = torch.full_like(hidden_RD, 100.0)
    for chunk in chunks:
        chunk.add_to(grad_RD, chunk.hidden_TD)
    times_R = torch.ones(len(hidden_RD))
    if rows_C is not None:
        times_R = torch.tensor([1.0, 2, 1, 0, 0, 1, 3, 0])
    torch.testing.assert_close(grad_RD, 100 + times_R[:, None] * hidden_RD)


@pytest.mark.parametrize(
    ("lengths", "limit_rows", "expected"),
    [
        ([3], 4, [3]),
        ([9], 4, [9]),
        ([2, 2, 2], 4, [4, 6]),
        ([3, 2, 4, 1], 4, [3, 5, 9, 10]),
        ([1, 9, 1, 1, 1], 4, [1, 10, 13]),
        ([2, 1, 1], 1, [2, 3, 4]),
        ([1, 2, 3], 100, [6]),
        ([], 4, []),
    ],
)
def test_sequences_stay_whole(
    lengths: list[int], limit_rows: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = torch.tensor([9, 2, 5, -1, 7])[: len(lengths)]
    keep_whole_C = names.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    chunks, _, _ = chunks_of(sum(lengths), limit_rows, monkeypatch, keep_whole_C=keep_whole_C)
    assert ends(chunks) == expected


def test_sequence_in_two_places_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="tokens of a sequence must be neighbours"):
        chunks_of(5, 4, monkeypatch, keep_whole_C=torch.tensor([1, 1, 2, 2, 1]))
