"""A group of ranks asked in every way: alone, in a flight, by the command line, behind a server, and checked.

Enters: a whole model that sees and its group as bundles, text and conversations with pictures. Leaves: which ways gave
the tokens of the group alone, how many tokens were the whole model's, and the divergence that `check` found.
"""

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

import arriero
from arriero.accuracy import check
from arriero.runtime import Session

from .server import ServerProcess

TOKENS = 24
QUESTIONS = ("What is this?", "How many things are there?")
TEXT = "The list type is"


def messages(question: str, picture: Path | None) -> list[dict[str, Any]]:
    """A question, as a session takes it."""
    seen = [{"type": "image", "image": picture.read_bytes()}] if picture else []
    return [{"role": "user", "content": [*seen, {"type": "text", "text": question}]}]


def body(question: str, picture: Path | None, ends: list[int]) -> dict[str, Any]:
    """A request to a server with such a question, whose answer none of the end tokens ends."""
    seen = []
    if picture:
        url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
        seen = [{"type": "image_url", "image_url": {"url": url}}]
    said = [{"role": "user", "content": [*seen, {"type": "text", "text": question}]}]
    return {"messages": said, "max_tokens": TOKENS, "temperature": 0, "logit_bias": {str(end): -100 for end in ends}}


def served_texts(group: Path, bodies: list[dict[str, Any]], threads: int) -> list[str]:
    """Texts that `arriero serve GROUP` answers."""
    options = ["--threads", str(threads), "--max-seq", "512", "--slots", "4", "--quiet"]
    with ServerProcess(group, *options) as server:
        with httpx.Client(base_url=server.url, timeout=300) as client:
            answers = [client.post("/v1/chat/completions", json=each) for each in bodies]
        if code := server.end():
            raise RuntimeError(f"the server ended with {code}")
    return [answer.raise_for_status().json()["choices"][0]["message"]["content"] for answer in answers]


def run_ids(group: Path, question: str, picture: Path | None, threads: int) -> list[int]:
    """Tokens that `arriero run GROUP` writes."""
    command = [sys.executable, "-m", "arriero", "run", str(group), "--prompt", question, "--json", "--ignore-eos"]
    command += ["--max-new-tokens", str(TOKENS), "--temperature", "0", "--threads", str(threads), "--max-seq", "512"]
    command += ["--image", str(picture)] if picture else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    ids: list[int] = json.loads(done.stdout)["ids"]
    return ids


def ways(whole: Path, group: Path, pictures: list[Path], data: list[Path], threads: int) -> dict[str, Any]:
    """All ways of one group."""
    ends = json.loads((whole / "generation_config.json").read_text())["eos_token_id"]
    ends = ends if isinstance(ends, list) else [ends]
    settings: dict[str, Any] = {"max_new_tokens": TOKENS, "temperature": 0, "logit_bias": dict.fromkeys(ends, -100)}
    asked = [(question, picture) for picture in (None, *pictures) for question in QUESTIONS]
    prompts: list[Any] = [messages(*each) for each in asked]
    exact: Session = arriero.load(whole, max_seq=512, threads=threads)
    expected = [exact.generate(prompt, **settings).ids for prompt in prompts]
    del exact
    session = arriero.load(group, max_seq=512, threads=threads)
    alone = [session.generate(prompt, **settings) for prompt in prompts]
    in_flight = session.generate_many(prompts, slots=3, prefill_budget=16, **settings)
    plain = {"max_new_tokens": TOKENS, "temperature": 0, "eos_token_id": []}
    own = [session.generate(question, images=[picture] if picture else [], **plain).ids for question, picture in asked]
    del session  # its ranks end
    served = served_texts(group, [body(*each, ends) for each in asked], threads)
    ran = [run_ids(group, *each, threads) for each in asked]
    verdict = check(group, whole, data=[str(path) for path in data], samples=8, threads=threads)
    return {
        "answers": len(asked),
        "with_pictures": sum(picture is not None for _, picture in asked),
        "flight_as_alone": sum(each.ids == one.ids for each, one in zip(in_flight, alone, strict=True)),
        "server_as_alone": sum(text == one.text for text, one in zip(served, alone, strict=True)),
        "run_as_alone": sum(ids == one for ids, one in zip(ran, own, strict=True)),
        "as_the_whole": sum(one.ids == other for one, other in zip(alone, expected, strict=True)),
        "check_kl": float(verdict.metrics["kl"].value),
        "check_same_likeliest": float(verdict.metrics["top1"].value),
    }
