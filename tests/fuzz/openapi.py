"""schemathesis against `/openapi.json` of a running server: thousands of requests, valid and not, from its schemas.

No answer may be a 5xx, have a form that the document does not name, or take what the document forbids. Valid requests
may be refused with 400 where a schema cannot say why: a prompt too long for the context, an image that is no image, a
regular expression that is none. schemathesis is installed into an environment of its own.

    python tests/fuzz/openapi.py BUNDLE [--examples 1000] [--venv DIR] [--seed 1]
"""

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from support.server import ServerProcess  # noqa: E402

REQUIREMENT = "schemathesis>=4.10,<5"
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "404", "429"]

[checks.negative_data_rejection]
expected-statuses = ["400", "401", "403", "404", "405", "408", "413", "415", "429", "431"]
"""


def installed(folder: Path) -> Path:
    """An environment with schemathesis in it. Returns its command."""
    if not (folder / "bin" / "schemathesis").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "-q", "install", REQUIREMENT], check=True)
    return folder / "bin" / "schemathesis"


def main() -> None:
    parser = argparse.ArgumentParser(description="schemathesis against a server.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--examples", type=int, default=1000, help="Requests of each operation and phase at most.")
    parser.add_argument("--venv", type=Path, default=ROOT / "build" / "schemathesis")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4)
    asked = parser.parse_args()
    command = installed(asked.venv)
    options = ("--threads", "1", "--max-seq", "512", "--max-new-tokens", "4", "--slots", "8", "--queue", "1000")
    with ServerProcess(asked.folder, *options) as server, tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "schemathesis.toml"
        config.write_text(CONFIG)
        arguments = ["--config-file", config, "run", f"{server.url}/openapi.json", "-n", asked.examples]
        arguments += ["--seed", asked.seed, "--workers", asked.workers, "--continue-on-failure", "--no-color"]
        arguments += ["--phases", "examples,coverage,fuzzing", "--max-response-time", "60", "--request-timeout", "120"]
        code = subprocess.run([command, *map(str, arguments)], cwd=folder).returncode
        ended = server.end()
        faults = [line for line in server.log if line["event"] in ("fault", "text")]
    print(f"schemathesis {code}, the server {ended}, faults {faults[:3]}")
    sys.exit(bool(code or ended or faults))


if __name__ == "__main__":
    main()
