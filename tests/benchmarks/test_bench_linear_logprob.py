"""A smoke run of bench_linear_logprob."""

import pytest


@pytest.mark.slow
def test_smoke(smoke):
    report = smoke("bench_linear_logprob.py")
    names = {"ours", "log_softmax"} | (set() if report["notes"] else {"torch.compile"})
    sections = {row["section"] for row in report["rows"]}
    assert sections == {"forward, T=8 H=16 V=301", "forward + backward, T=8 H=16 V=301"}
    for section in sections:
        rows = [row for row in report["rows"] if row["section"] == section]
        assert {row["name"] for row in rows} == names
        assert [row["ratio"] is None for row in rows] == [row["name"] == "ours" for row in rows]
        assert all(row["ms"]["median"] > 0 and row["peak_bytes"] > 0 for row in rows)
    forward, both = (
        next(r for r in report["rows"] if r["section"].startswith(s)) for s in ("forward,", "forward +")
    )
    assert both["ideal_ms"] == pytest.approx(3 * forward["ideal_ms"])
    assert [check["ok"] for check in report["checks"]] == [True]
