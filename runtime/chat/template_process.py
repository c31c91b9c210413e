"""The process that chat templates run in: requests from its input, answers to its output, until the input ends.

It is started with this file's path and the parent's module path, and imports Jinja and `environment.py` alone. A
request is trusted: it comes from the parent. An answer is a kind and a text, so that nothing in it need be trusted.
"""

import sys
from typing import IO

READY, DONE, BROKEN, FAILED, COSTLY = b"r", b"d", b"b", b"f", b"c"
"""Kinds of answers: at the start; a text; a template that is no program; one that failed; one beyond its budget."""

MEMORY = 1 << 30
"""Bytes of address space that the process may have; Linux alone keeps to it."""


def write_block(stream: IO[bytes], data: bytes) -> None:
    """Writes data behind its length."""
    stream.write(len(data).to_bytes(8, "little"))
    stream.write(data)
    stream.flush()


def read_block(stream: IO[bytes]) -> bytes:
    """Reads what `write_block` wrote.

    Raises:
        EOFError: The stream has ended.
    """
    length = int.from_bytes(_read(stream, 8), "little")
    return _read(stream, length)


def _read(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def main() -> None:
    """Answers requests."""
    import importlib.util
    import json
    import marshal
    import os
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [each for each in json.loads(sys.argv[1]) if os.path.abspath(each or ".") != here]
    place = os.path.join(here, "environment.py")
    spec = importlib.util.spec_from_file_location("arriero_template_environment", place)
    assert spec is not None
    assert spec.loader is not None
    environment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(environment)
    _bound_memory()
    write_block(target, READY)
    while True:
        try:
            request = marshal.loads(read_block(source))
        except EOFError:
            return
        kind, text = environment.answer(request)
        write_block(target, kind + text.encode("utf-8", "surrogatepass"))


def _bound_memory() -> None:
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


if __name__ == "__main__":
    main()
