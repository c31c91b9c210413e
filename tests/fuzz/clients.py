"""Clients that no one here wrote, against a running server, each in an environment of its own.

OpenAI's Python client in its major versions and its npm package, litellm, LangChain, instructor, and aiperf as a load.
Each asks for a whole answer and a stream; where it can, for a call and for JSON of a schema.

    python tests/fuzz/clients.py BUNDLE [--only NAME …] [--venvs DIR]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from support.server import ServerProcess  # noqa: E402

OPENAI = """
import json, sys
from openai import OpenAI
client = OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
ask = {"model": sys.argv[2], "messages": [{"role": "user", "content": "Explain list.append."}], "max_tokens": 12}
whole = client.chat.completions.create(**ask, temperature=0)
stream = client.chat.completions.create(**ask, temperature=0, stream=True)
text = "".join(c.choices[0].delta.content or "" for c in stream)
assert whole.choices[0].message.content == text and whole.usage.completion_tokens == 12
tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {
    "city": {"enum": ["Lima", "Cusco"]}}, "required": ["city"], "additionalProperties": False}}}
call = client.chat.completions.create(**{**ask, "max_tokens": 64}, tools=[tool], tool_choice="required")
found = call.choices[0].message.tool_calls[0].function
assert found.name == "weather" and json.loads(found.arguments)["city"] in ("Lima", "Cusco")
assert client.responses.create(model=sys.argv[2], input="Hello", max_output_tokens=8).output_text
print("same text whole and streamed, call, responses")
"""

LITELLM = """
import sys, litellm
ask = {"model": "openai/" + sys.argv[2], "api_base": sys.argv[1] + "/v1", "api_key": "none", "max_tokens": 12,
       "messages": [{"role": "user", "content": "Explain list.append."}], "temperature": 0}
whole = litellm.completion(**ask)
text = "".join(c.choices[0].delta.content or "" for c in litellm.completion(**ask, stream=True))
assert whole.choices[0].message.content == text
print("same text whole and streamed")
"""

LANGCHAIN = """
import sys
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from typing import Literal
model = ChatOpenAI(base_url=sys.argv[1] + "/v1", api_key="none", model=sys.argv[2], max_tokens=64, temperature=0)
whole = model.invoke("Explain list.append.").content
assert "".join(c.content for c in model.stream("Explain list.append.")) == whole
class Weather(BaseModel):
    '''The weather of a city.'''
    city: Literal["Lima", "Cusco"]
assert model.with_structured_output(Weather, method="json_schema").invoke("Lima").city in ("Lima", "Cusco")
assert model.with_structured_output(Weather, method="function_calling").invoke("Lima").city in ("Lima", "Cusco")
print("text, stream, schema, call")
"""

INSTRUCTOR = """
import sys, instructor
from openai import OpenAI
from pydantic import BaseModel
from typing import Literal
class Weather(BaseModel):
    city: Literal["Lima", "Cusco"]
    warm: bool
for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
    client = instructor.from_openai(OpenAI(base_url=sys.argv[1] + "/v1", api_key="none"), mode=mode)
    found = client.chat.completions.create(model=sys.argv[2], response_model=Weather, max_tokens=96, max_retries=0,
                                           messages=[{"role": "user", "content": "The weather of Lima"}])
    assert isinstance(found, Weather)
print("schema, call")
"""

NPM = """
import OpenAI from "openai";
const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "none" });
const ask = { model, messages: [{ role: "user", content: "Explain list.append." }], max_tokens: 12, temperature: 0 };
const whole = await client.chat.completions.create(ask);
let text = "";
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true }))
  text += chunk.choices[0]?.delta?.content ?? "";
if (text !== whole.choices[0].message.content) throw new Error(text);
const response = await client.responses.create({ model, input: "Hello", max_output_tokens: 8 });
if (!response.output_text) throw new Error("no text");
console.log("same text whole and streamed, responses");
"""

PYTHON = {
    "openai-2": (("openai>=2,<3",), OPENAI),
    "openai-3": (("openai>=3,<4",), OPENAI),
    "litellm": (("litellm",), LITELLM),
    "langchain": (("langchain-openai",), LANGCHAIN),
    "instructor": (("instructor",), INSTRUCTOR),
}


def python_client(name: str, venvs: Path, server: ServerProcess) -> str:
    """Runs a client's script in its environment. Returns what it says; its last line where it fails."""
    requirements, script = PYTHON[name]
    python = environment(venvs / name, *requirements)
    asked = subprocess.run([python, "-c", script, server.url, server.model], capture_output=True, text=True)
    return f"{version(python, requirements[0])}: {said(asked)}"


def environment(folder: Path, *requirements: str) -> Path:
    """An environment with packages in it. Returns its Python."""
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "-q", "install", *requirements], check=True)
        (folder / "made").touch()
    return python


def version(python: Path, requirement: str) -> str:
    """A package and its version in an environment."""
    name = requirement.partition(">")[0]
    code = f"import importlib.metadata; print(importlib.metadata.version({name!r}))"
    return f"{name} {subprocess.run([python, '-c', code], capture_output=True, text=True, check=True).stdout.strip()}"


def npm_client(venvs: Path, server: ServerProcess) -> str:
    """Runs OpenAI's npm package."""
    if shutil.which("npm") is None:
        return "skipped: npm is not installed"
    folder = venvs / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text('{"type": "module", "private": true}')
    (folder / "ask.mjs").write_text(NPM)
    subprocess.run(["npm", "install", "--silent", "openai"], cwd=folder, check=True, capture_output=True)
    asked = subprocess.run(["node", "ask.mjs", server.url, server.model], cwd=folder, capture_output=True, text=True)
    about = json.loads((folder / "node_modules" / "openai" / "package.json").read_text())
    return f"openai {about['version']} of npm: {said(asked)}"


REQUESTS = 24
"""Those that aiperf sends."""


def aiperf_client(venvs: Path, server: ServerProcess, folder: Path) -> str:
    """Runs aiperf as a load, with the served folder's tokenizer, which it takes from a hub's cache alone."""
    python = environment(venvs / "aiperf", "aiperf")
    command = [python.parent / "aiperf", "profile", "--model", server.model, "--url", server.url, "--streaming"]
    command += ["--endpoint-type", "chat", "--concurrency", "4", "--request-count", str(REQUESTS)]
    command += ["--tokenizer", "arriero/served"]
    command += ["--synthetic-input-tokens-mean", "64", "--output-tokens-mean", "16", "--ui", "none"]
    command += ["--artifact-dir", str(venvs / "aiperf" / "artifacts")]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cached(folder, venvs / "aiperf" / "hub"))}
    asked = subprocess.run(command, capture_output=True, text=True, env=offline)
    found = said(asked)
    if asked.returncode == 0:
        report = json.loads((venvs / "aiperf" / "artifacts" / "profile_export_aiperf.json").read_text())
        count, errors = int(report["request_count"]["avg"]), report["error_summary"]
        found = f"{count} requests" if count == REQUESTS and not errors else f"FAILED: {count} requests, {errors}"
    return f"{version(python, 'aiperf')}: {found}"


def cached(folder: Path, home: Path) -> Path:
    """Puts a folder's tokenizer into a hub's cache, as `arriero/served`. Returns the cache's home."""
    repository = home / "hub" / "models--arriero--served"
    for place in (repository / "refs", snapshot := repository / "snapshots" / "0"):
        place.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, snapshot / name)
    return home


def said(run: "subprocess.CompletedProcess[str]") -> str:
    """The last line of a run."""
    lines = (run.stdout if run.returncode == 0 else run.stderr or run.stdout).strip().splitlines()
    return ("" if run.returncode == 0 else "FAILED: ") + (lines[-1] if lines else "nothing")


def main() -> None:
    parser = argparse.ArgumentParser(description="Clients of others against a server.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", action="append", choices=[*PYTHON, "npm", "aiperf"])
    parser.add_argument("--venvs", type=Path, default=ROOT / "build" / "clients")
    asked = parser.parse_args()
    failed = False
    with ServerProcess(asked.folder, "--threads", "1", "--max-seq", "1024", "--slots", "4") as server:
        for name in asked.only or [*PYTHON, "npm", "aiperf"]:
            if name == "npm":
                found = npm_client(asked.venvs, server)
            elif name == "aiperf":
                found = aiperf_client(asked.venvs, server, asked.folder)
            else:
                found = python_client(name, asked.venvs, server)
            failed |= "FAILED" in found
            print(f"{name}: {found}", flush=True)
        failed |= bool(server.end())
    sys.exit(failed)


if __name__ == "__main__":
    main()
