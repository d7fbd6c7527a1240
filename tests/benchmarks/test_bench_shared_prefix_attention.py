"""bench_shared_prefix_attention: smoke runs, that its peers do the same work, and its refusals."""

import pytest
import torch

LABEL = "P=24 R=5 G=3 heads 4/2/16"
ERRORS = ("output error", "dQ error", "dK error", "dV error")


@pytest.fixture
def bench(bench_module):
    return bench_module("bench_shared_prefix_attention")


@pytest.fixture
def peers(bench_module):
    return bench_module("attention_peers")


def small_group(peers, device: str = "cpu", head_width: int = 16):
    return peers.Group(
        prefix=24,
        completion=5,
        size=3,
        num_heads=4,
        num_kv_heads=2,
        head_width=head_width,
        device=torch.device(device),
    )


def random_inputs(group, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(group.layout.num_rows, heads, group.head_width, generator=generator, dtype=torch.float64)
        .to(group.device, dtype)
        .requires_grad_()
        for heads in (group.num_heads, group.num_kv_heads, group.num_kv_heads)
    ]


def test_smoke(run, peers):
    report = run("--peers", "reference", "dense", "prefix-grouper")
    rows = {(row["section"], row["name"]): row for row in report["rows"]}
    names = ("ours", "masked SDPA", "dense SDPA", "PrefixGrouper-style")
    both, alone = f"forward + backward, {LABEL}", f"forward alone, {LABEL}"
    assert list(rows) == [(section, name) for section in (both, alone) for name in names]
    group = small_group(peers)
    assert group.pairs == 24**2 / 2 + 3 * 5 * 24 + 3 * 5**2 / 2
    for name in names:
        seconds = rows[both, name]["ms"]["median"] / 1e3
        rate = rows[both, name]["figures"].pop("useful TFLOP/s")
        assert rate == pytest.approx(14 * 16 * 4 * group.pairs / seconds / 1e12)
        assert tuple(rows[both, name]["figures"]) == ERRORS
        assert rows[both, name]["ideal_ms"] == pytest.approx(3.5 * rows[alone, name]["ideal_ms"])
    ideal = {name: rows[both, name]["ideal_ratio"] for name in names}
    assert ideal == dict.fromkeys(names) | {
        "dense SDPA": pytest.approx(3 * 29**2 / 2 / group.pairs),
    }
    checks = {check["name"]: check["ok"] for check in report["checks"]}
    assert list(checks) == [
        *(f"{what} / dense SDPA's, {LABEL}" for what in ERRORS),
        f"dense SDPA's time / ours, {LABEL}",
    ]
    assert list(checks.values())[:4] == [True] * 4
    assert report["machine"]["dtype"] == "bfloat16"


@pytest.mark.slow
def test_flex_has_a_row_of_its_forward_pass_or_a_note(run):
    report = run("--peers", "flex")
    sections = {row["section"].partition(",")[0] for row in report["rows"] if row["name"] == "FlexAttention"}
    notes = [note for note in report["notes"] if note.startswith("FlexAttention")]
    assert sections <= {"forward alone"}
    assert notes[0].startswith("FlexAttention has no backward here: NotImplementedError")
    assert bool(sections) != any("is left out" in note for note in notes)


@pytest.mark.parametrize("name", ["reference", "dense", "prefix-grouper"])
def test_peers_do_the_work_of_ours(peers, name):
    group = small_group(peers)
    inputs = random_inputs(group, torch.float64)
    upstream = torch.randn(inputs[0].shape, dtype=torch.float64)
    expected = peers.ours(*inputs, group)
    actual = peers.PEERS[name].attend_packed(*inputs, group)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        rtol=0,
        atol=1e-9,
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["reference", "dense", "prefix-grouper", "flex", "three-flash", "dense-flash"]
)
def test_peers_do_the_same_on_cuda(peers, name):
    group = small_group(peers, "cuda", head_width=64)
    inputs = random_inputs(group, torch.bfloat16)
    upstream = torch.randn(inputs[0].shape, device="cuda")
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = peers.PEERS["reference"].attend_packed(*exact, group)
    actual = (peers.PEERS | peers.CUDA_PEERS)[name].attend_packed(*inputs, group)
    grads = torch.autograd.grad(actual, inputs, upstream.to(actual.dtype))
    exact_grads = torch.autograd.grad(expected, exact, upstream.to(torch.bfloat16).double())
    for mine, truth in zip((actual, *grads), (expected, *exact_grads), strict=True):
        assert (mine.double() - truth).norm() <= 0.02 * truth.norm()


def test_a_peer_that_does_not_run_gets_a_note(run, peers, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no such kernel\nwith details")

    monkeypatch.setitem(peers.PEERS, "flex", peers.Peer(name="Flex 0", attend=refuse, note="never shown"))
    report = run("--peers", "flex")
    assert {row["name"] for row in report["rows"]} == {"ours"}
    assert report["notes"][1:] == [
        "Flex 0 has no backward here: RuntimeError: no such kernel",
        "Flex 0 is left out, it does not run here: RuntimeError: no such kernel",
    ]


def test_our_own_failure_is_no_note(bench, run, peers, monkeypatch):
    def refuse(*_):
        raise RuntimeError("broken kernel")

    monkeypatch.setattr(bench, "OURS", peers.Peer(name="ours", attend=refuse))
    with pytest.raises(RuntimeError, match="broken kernel"):
        run("--peers", "dense")


def test_own_tests_exist(bench, bench_module):
    root = bench_module("report").ROOT
    assert [test for test in bench.OWN_TESTS if not (root / test).is_file()] == []


def test_peers_of_another_device_and_uneven_heads_are_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--smoke", "--peers", "three-flash"])
    assert "three-flash need --device cuda" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--smoke", "--sizes", "24,5,3,5,2,16"])
    assert "5 query heads: give a multiple of the 2 others" in capsys.readouterr().err
