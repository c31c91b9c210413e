"""Scout and Maverick at full size, as sparse files: what export needs does not depend on the bytes of weights."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import sparse


@pytest.mark.parametrize(
    ("name", "gigabytes", "split", "graph"),
    [
        ("MAVERICK", 803, {}, "vision.onnx"),
        ("SCOUT", 217, {"tp": 2, "ep": 2}, "rank-1/decoder.onnx"),
    ],
)
def test_full_size_exports_in_little_memory_and_passes_the_checker(
    tmp_path: Path, name: str, gigabytes: int, split: dict[str, int], graph: str
) -> None:
    total = sparse.write_sparse_checkpoint(sparse.multimodal(getattr(sparse, name)), tmp_path / "checkpoint")
    assert total // 10**9 == gigabytes
    code = (
        "import sys\n"
        "from arriero.export import export_checkpoint\n"
        f"export_checkpoint(sys.argv[1], sys.argv[2], copy_weights=True, **{split})\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "checkpoint"), str(tmp_path / "model")]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024
    assert peak < 1e9  # not getrusage's: a child begins with its parent's
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in files if path.suffix != ".safetensors")
    assert written < 20e6
    stored = sum(path.stat().st_blocks * 512 for path in files)
    assert stored < 20e6  # the copies are as sparse as the originals
    check = "import onnx, sys; onnx.checker.check_model(sys.argv[1])"
    subprocess.run([sys.executable, "-c", check, str(tmp_path / "model" / graph)], check=True)
