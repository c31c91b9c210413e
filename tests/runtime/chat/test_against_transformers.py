from chat_pairs import compare_pairs


def test_conversations_are_written_as_transformers_writes_them() -> None:
    counts = compare_pairs(120, seed=3)  # more with tests/fuzz/conversations.py
    equal = sum(count for kind, count in counts.items() if kind.startswith(("equal", "both")))
    assert equal > 60, counts
    assert sum(count for kind, count in counts.items() if kind.startswith("we alone refuse")) < 20, counts
