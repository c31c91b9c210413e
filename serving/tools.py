"""PLACEHOLDER until the tool formats merge."""

from typing import Any


def tool_grammar(tools: Any, choice: Any, parallel: bool) -> str:
    raise NotImplementedError


class ToolCallReader:
    def __init__(self, tools: Any, **k: Any) -> None: ...
    def feed(self, text: str) -> Any:
        return text, []

    def end(self) -> Any:
        return "", []
