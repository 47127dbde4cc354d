"""The table of bench/results/recovery is of the rows beside it."""

from recovery import RESULTS, read, table


def test_the_table_is_of_the_rows() -> None:
    rows = [row for path in sorted(RESULTS.glob("*.jsonl")) for row in read(path)]
    assert (RESULTS / "recovery.md").read_text(encoding="utf-8") == table(rows)
    recovered = [row for row in rows if row["loss"] == "kl"]
    pruned = {(row["name"], row["ratio"]): row["kl_nats"] for row in rows if not row["tokens"]}
    assert recovered
    for row in recovered:  # never worse, also on a text that it has not seen
        assert row["kl_nats"] < pruned[row["name"], row["ratio"]]
