"""Golden files and reports, killed at their worst moments: complete or not there, and nothing is left in the end."""

import os
import signal
import sys
from pathlib import Path

import arriero.accuracy.report
import arriero.export.config  # noqa: F401  # for the processes below
from arriero.accuracy.golden import read_golden

KILL = "import os, signal\ndef kill(*_): os.kill(os.getpid(), signal.SIGKILL)\n"

GOLDEN = """
import sys
from pathlib import Path
import numpy as np
from arriero.accuracy.golden import write_golden
from arriero.accuracy.recorded import Golden
from arriero.export.config import model_spec
import json
spec = model_spec(json.loads(Path(sys.argv[2]).read_text()))
logs = np.full((1, 3), np.log(0.25), np.float32)
golden = Golden(
    source="s", spec=spec, tokenizer="t", format="none", ids_WS=np.ones((1, 4), np.int32), is_image_WS=None,
    tiles_W=None, pixels_N3PP=None, vision=None, top_ids_WNK=np.zeros((1, 3, 1), np.int32),
    top_logs_WNK=logs[..., None],
    rest_logs_WN=np.full((1, 3), np.log(0.75), np.float32), next_logs_WN=logs,
    experts_LWSK=None, continued_PC=None,
)
if sys.argv[3:]:
    setattr({"os": os, "Path": Path}[sys.argv[3]], sys.argv[4], kill)
write_golden(golden, Path(sys.argv[1]))
"""

REPORT = """
import sys
from pathlib import Path
from types import SimpleNamespace
from arriero.accuracy import report
verdict = SimpleNamespace(as_fields=lambda: {"a": 1})
report.junit = lambda verdict: b"junit"
report.page = (lambda *_: "page") if not sys.argv[2:] else kill
report.write_report(verdict, Path(sys.argv[1]))
"""


def run(code: str, *arguments: str | Path) -> int:
    """Runs code in a process of its own, which has this one's modules. Returns its exit code, as of `subprocess`."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    failed = 1
    try:
        sys.argv = ["-c", *map(str, arguments)]
        exec(KILL + code, {})
        failed = 0
    finally:
        os._exit(failed)


def test_a_golden_file_is_whole_or_not_there(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "g.safetensors"
    for place in (("os", "fsync"), ("Path", "replace")):
        assert run(GOLDEN, out, tiny / "config.json", *place) == -signal.SIGKILL
        assert not out.exists()
    assert run(GOLDEN, out, tiny / "config.json") == 0
    assert read_golden(out).source == "s"
    before = out.read_bytes()
    assert run(GOLDEN, out, tiny / "config.json", "os", "fsync") == -signal.SIGKILL
    assert out.read_bytes() == before
    assert run(GOLDEN, out, tiny / "config.json") == 0
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_report_is_whole_or_not_there(tmp_path: Path) -> None:
    out = tmp_path / "out" / "report"
    assert run(REPORT, out, "kill") == -signal.SIGKILL
    assert not out.exists()
    assert run(REPORT, out) == 0
    assert {path.name for path in out.iterdir()} == {"verdict.json", "junit.xml", "report.html"}
    assert [path.name for path in out.parent.iterdir()] == [out.name]
