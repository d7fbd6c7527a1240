"""bench_grpo_head: smoke runs, that its heads do the same work, and its refusals."""

import pytest
import torch

from omnigrpo_kernels.grpo_objective import ObjectiveConfig, TokenBatch, token_terms

LABEL = "T=32 D=16 V=301"
CHECKS = {
    "log-prob error": "<= 1e-05",
    "dX error / naive's": "<= 2",
    "dW error / naive's": "<= 2",
    "naive's time / ours": ">= 2.1",
    "chunked's time / ours": ">= 3.3",
    "time / three products": "<= 0.9",
    "extra memory / float32 logits": "<= 0.35",
}


@pytest.fixture
def bench(bench_module):
    return bench_module("bench_grpo_head")


@pytest.fixture
def peers(bench_module):
    return bench_module("head_peers")


@pytest.fixture
def problem(peers):
    """Two chunks of the chunked head, in float64."""
    small = peers.random_problem(512, 16, 301, device=torch.device("cpu"), dtype=torch.bfloat16)
    return small.on_own_leaves(dtype=torch.float64)


def test_smoke(run):
    report = run("--heads", "naive", "chunked")
    rows = {(row["section"], row["name"]): row for row in report["rows"]}
    heads = ("ours", "naive", "chunked")
    assert list(rows) == [
        *((f"forward + backward, {LABEL}", name) for name in (*heads, "three products")),
        *((f"log-prob alone, {LABEL}", name) for name in heads),
    ]
    assert all(row["ms"]["median"] > 0 and row["peak_bytes"] > 0 for row in report["rows"])
    for name in heads:
        update, forward = rows[f"forward + backward, {LABEL}", name], rows[f"log-prob alone, {LABEL}", name]
        assert update["ideal_ms"] == pytest.approx(3 * forward["ideal_ms"])
        seconds = update["ms"]["median"] / 1e3
        assert update["figures"].pop("useful TFLOP/s") == pytest.approx(6 * 32 * 16 * 301 / seconds / 1e12)
        assert update["figures"].keys() == {"extra MiB", "log-prob error", "dX error", "dW error"}
        weight_itemsize = 4 if name == "ours" else 2
        gradients = 2 * 32 * 16 + weight_itemsize * 301 * 16
        assert update["figures"]["extra MiB"] == pytest.approx((update["peak_bytes"] - gradients) / 2**20)
    naive = rows[f"forward + backward, {LABEL}", "naive"]["figures"]
    assert (naive["dX error"], naive["dW error"]) == (1, 1)
    assert {check["name"]: check["target"] for check in report["checks"]} == {
        f"{name}, {LABEL}": target for name, target in CHECKS.items()
    }
    exact = [check for check in report["checks"] if "error" in check["name"]]
    assert [check["ok"] for check in exact] == [True] * 3
    assert report["machine"]["dtype"] == "bfloat16"


@pytest.mark.slow
def test_every_head_has_its_rows_or_says_why_not(run, peers):
    report = run()
    names = " ".join(row["name"] for row in report["rows"]).lower().replace("torch.compile", "compile")
    out = " ".join(note for note in report["notes"] if "is left out" in note).lower()
    missing = [name for name in peers.HEADS if name not in names]
    assert set(missing) <= {*peers.PEERS, "compile"}
    assert all(name in out for name in missing)
    errors = [
        row["figures"][what]
        for row in report["rows"]
        for what in ("dX error", "dW error")
        if what in row["figures"]
    ]
    assert max(errors) < 2


def test_red_own_tests_refuse_the_measurement(bench, monkeypatch, tmp_path):
    red, path = tmp_path / "test_red.py", tmp_path / "report.json"
    red.write_text("def test_it():\n    assert 1 == 2\n")
    monkeypatch.setattr(bench, "OWN_TESTS", (str(red),))
    with pytest.raises(SystemExit, match=r"assert 1 == 2[\s\S]*nothing was measured"):
        bench.main(["--smoke", "--json", str(path)])
    assert not path.exists()


def test_own_tests_exist(bench, bench_module):
    root = bench_module("report").ROOT
    assert [test for test in bench.OWN_TESTS if not (root / test).is_file()] == []


def test_heads_that_cannot_run_are_left_out_with_the_reason(run, peers, monkeypatch):
    def needs_cuda(problem):
        raise RuntimeError("no CUDA device\nwith details")

    def absent():
        raise ModuleNotFoundError("No module named 'trl'")

    refusing = peers.Head(name="Liger 0", loss=needs_cuda, logprob=needs_cuda, note="never shown")
    monkeypatch.setitem(peers.HEADS, "liger", lambda: refusing)
    monkeypatch.setitem(peers.HEADS, "trl", absent)
    report = run("--heads", "liger", "trl")
    assert {row["name"] for row in report["rows"]} == {"ours", "three products"}
    _, absence, refusal = report["notes"]
    assert absence.startswith(
        "trl is left out, it is not installed: ModuleNotFoundError: No module named 'trl'"
    )
    assert absence.endswith("(pip install -e '.[peers]')")
    assert refusal == "Liger 0 is left out, it does not run here: RuntimeError: no CUDA device"


def test_our_own_failure_is_no_note(run, peers, monkeypatch):
    def broken(problem):
        raise RuntimeError("broken kernel")

    head = peers.Head(name="ours", loss=broken, logprob=broken)
    monkeypatch.setitem(peers.HEADS, "ours", lambda: head)
    with pytest.raises(RuntimeError, match="broken kernel"):
        run("--heads", "naive")


def test_naive_head_states_the_objective_of_the_kernels(peers, problem):
    batch = TokenBatch(
        advantage_C=problem.advantage_T,
        weight_C=problem.token_weight_T,
        sequence_C=problem.sequence_T,
        old_C=problem.old_T,
        reference_C=problem.reference_T,
    )
    config = ObjectiveConfig(kl_coefficient=peers.KL_COEFFICIENT, clip_low=peers.CLIP, clip_high=peers.CLIP)
    logprob_T = peers.naive().logprob(problem)
    terms = token_terms(logprob_T, torch.zeros_like(logprob_T), batch, config)
    expected = (batch.weight_C * terms.loss_C).sum()
    torch.testing.assert_close(peers.naive().loss(problem), expected, rtol=1e-6, atol=1e-7)


def test_chunked_head_equals_the_naive_one(peers, problem):
    results = []
    for head in (peers.naive(), peers.chunked()):
        mine = problem.on_own_leaves()
        loss = head.loss(mine)
        loss.backward()
        results.append((loss.detach(), mine.hidden_TD.grad, mine.weight_VD.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["liger", "trl", "cut-cross-entropy"])
def test_installed_peers_have_the_naive_loss(peers, problem, name):
    mine = problem.on_own_leaves(dtype=torch.float32)
    try:
        loss = peers.HEADS[name]().loss(mine)
    except ImportError as error:
        pytest.skip(f"needs the extra peers: {error}")
    except peers.refusals() as error:
        pytest.skip(f"does not run here: {error}")
    torch.testing.assert_close(loss.double(), peers.naive().loss(problem), rtol=1e-4, atol=1e-5)


def test_rows_that_make_no_equal_sequences_are_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--smoke", "--sizes", "30,16,301"])
    assert "T is 30: give a multiple of 8" in capsys.readouterr().err
