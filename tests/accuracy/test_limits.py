"""Limits from files and options: profiles, ranges, what goes before what."""

from pathlib import Path

import pytest

from arriero.accuracy.gates import DEFAULTS
from arriero.accuracy.limits import effective, read_limits
from arriero.errors import AccuracyError


def test_an_option_goes_before_the_profile_and_that_before_every_and_the_default(tmp_path: Path) -> None:
    path = tmp_path / "limits.toml"
    path.write_text("[every]\nflips = 0.05\nkl = 0.5\n[int8]\nkl = 0.02\ntop1 = 0.95\n[int4]\nkl = 0.2\n")
    limits, origins = effective("int8", {"top1": 0.99, "greedy": None}, read_limits(path))
    assert limits == {**DEFAULTS["int8"], "flips": 0.05, "kl": 0.02, "top1": 0.99}
    assert origins == {"perplexity_ratio": "default", "kl": "file", "top1": "given", "flips": "file"}
    assert effective("fp8", {}, read_limits(path))[0]["kl"] == 0.5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[int9]\nkl = 1", r"profile \[int9\] is unknown: choose from \[every\], \[none\], \[int8\]"),
        ("[int8]\nkld = 1", r"\[int8\]: limit 'kld' is unknown: choose from perplexity_ratio"),
        ("kl = 0.1", r"kl stands in no table: put it under \[every\] or a recipe's, as \[int8\]"),
        ("int8 = 3", r"int8 is 3, expected a table \[int8\]"),
        ("[int8]\ntop1 = 95", r"the limit of top1 is 95, expected a share from 0 to 1, as 0.95: 95 % is 0.95"),
        ("[int8]\nkl = true", "the limit of kl is True, expected nats"),
        ("[int8", "not TOML"),
        ("[int8]\nkl = 0x" + "f" * 999, r"the limit of kl is \d+[.]{3}\d+…?, expected nats"),
        ("[int8]\nkl = 1e200", r"the limit of kl is 1e\+200, expected nats"),
        (".".join("a" * 9000) + " = 1", "18003 bytes, expected at most 16384: give a TOML file"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "limits.toml").write_text(text)
    with pytest.raises(AccuracyError, match=said):
        read_limits(tmp_path / "limits.toml")


@pytest.mark.parametrize(
    ("metric", "limit"),
    [("top1", 95), ("kl", -5), ("perplexity_ratio", 0), ("perplexity_ratio", float("nan")), ("greedy", 33)],
)
def test_limits_out_of_range_are_refused(metric: str, limit: float) -> None:
    with pytest.raises(AccuracyError, match=f"the limit of {metric} is .*, expected"):
        effective("int8", {metric: limit})


def test_a_missing_file_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(AccuracyError, match="give a TOML file of limits with --limits"):
        read_limits(tmp_path / "none.toml")
