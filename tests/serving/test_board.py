"""The Grafana board asks for nothing that the server does not count."""

import json
import re
from pathlib import Path

BOARD = Path(__file__).parent.parent.parent / "docs" / "grafana.json"


def test_every_panel_has_its_place_and_asks_for_metrics_of_known_names() -> None:
    board = json.loads(BOARD.read_text("utf-8"))
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
        for target in panel["targets"]:
            names = re.findall(r"(?:vllm|arriero):\w+", target["expr"])
            assert names
            assert target["expr"].count("(") == target["expr"].count(")")
    text = BOARD.read_text("utf-8")
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "time_to_first_token_seconds_bucket",
    ):
        assert f"vllm:{name}" in text
