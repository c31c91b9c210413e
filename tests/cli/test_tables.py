"""The tables on the terminal."""

from pathlib import Path
from typing import Any

import pytest

from arriero.cli.tables import kind_of, show_quantised, show_verdict

REPORT = Path("/somewhere/report.html")


def record(name: str, weight: float, output: float, stored: str = "int8") -> dict[str, Any]:
    return {"name": name, "format": stored, "weight_sqnr": weight, "output_sqnr": output}


def experts(layers: int, count: int) -> list[dict[str, Any]]:
    names = (f"layers.{at}.feed_forward.experts.down_proj[{each}]" for at in range(layers) for each in range(count))
    return [record(name, 40 + number % 3, 30 + number % 5) for number, name in enumerate(names)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("layers.11.self_attn.q_proj", "attention"),
        ("layers.0.feed_forward.shared_expert.up_proj", "shared experts"),
        ("layers.0.feed_forward.experts.gate_up_proj[127]", "routed experts"),
        ("layers.0.feed_forward.router", "routers"),
        ("layers.0.feed_forward.down_proj", "dense MLPs"),
        ("lm_head", "LM head"),
        ("vision_model.model.layers.3.self_attn.o_proj", "tower attention"),
        ("vision_model.model.layers.3.mlp.fc1", "tower MLPs"),
        ("vision_model.patch_embedding.linear", "tower, others"),
        ("multi_modal_projector.linear_1", "tower, others"),
        ("something.new", "something.new"),
    ],
)
def test_weights_have_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_large_model_is_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show_quantised(experts(48, 128), {"lm_head": "bfloat16"}, REPORT, every_weight=False)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line.split() for line in captured.err.splitlines() if line.strip()]
    assert len(lines) < 10
    assert ["routed", "experts", "6,144", "int8", "40.0", "41.0", "30.0", "32.0"] in lines
    assert ["LM", "head", "1", "bfloat16", "exact"] in lines
    assert lines[-1] == ["Report:", str(REPORT)]


def test_types_of_a_kind_have_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    name = "layers.{}.self_attn.q_proj".format
    records = [record(name(0), 50, 45), record(name(1), 14, 19, "int4"), record(name(2), 16, 21, "int4")]
    show_quantised(records, {name(3): "bfloat16"}, REPORT, every_weight=False)
    lines = [line.split() for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert [line for line in lines if line[0] == "attention"] == [
        ["attention", "1", "bfloat16", "exact"],
        ["attention", "2", "int4", "14.0", "15.0", "19.0", "20.0"],
        ["attention", "1", "int8", "50.0", "50.0", "45.0", "45.0"],
    ]
    assert ["Worst", "output:", f"{name(1)},", "19.0", "dB"] in lines


def test_every_weight_is_listed_whole_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    records = experts(2, 16)
    show_quantised(records, {"layers.1.feed_forward.router": "bfloat16"}, REPORT, every_weight=True)
    shown = capsys.readouterr().err
    names = {line.split()[0] for line in shown.splitlines() if line.strip()}
    assert {each["name"] for each in records} <= names
    assert "layers.1.feed_forward.router" in names


def test_a_model_with_nothing_quantised_has_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    show_quantised([], {"lm_head": "float32"}, REPORT, every_weight=False)
    assert "float32" in capsys.readouterr().err


def test_brackets_in_a_folders_name_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = {
        "limits": [],
        "metrics": {},
        "notes": ["of [red] and [/]"],
        "location": None,
        "outcome": "pass",
    }
    found |= {"candidate": "[new]/a", "reference": "[/old]", "tokens": 5, "windows": 1}
    show_verdict(found, Path("[out]"))
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith(
        "of [red] and [/] [new]/a passes, over 5 tokens in 1 windows, against [/old]. Report: [out]/report.html"
    )
    show_verdict(found | {"outcome": "undecided", "remedy": "give more --samples than 3", "notes": []}, None)
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith("in 1 windows, against [/old]: give more --samples than 3.")
