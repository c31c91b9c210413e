"""The environment that chat templates are programs for: the one of `transformers`' `apply_chat_template`.

Enters: a template's source, and the variables it reads. Leaves: its text. Invariant: `render` is a function of its
arguments alone, which are plain data, so that it may run in a process of its own.

Jinja is loaded with this module: whoever needs no template imports it not.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

StandIns = Mapping[str, str]
"""A text that a template may write, and the text that takes its place in it."""

Pairs = tuple[tuple[str, str], ...]

MESSAGE = 1000
"""Characters of an error's message at most."""


class BrokenTemplateError(Exception):
    """A template does not compile: it is no program."""


class FailedTemplateError(Exception):
    """A template does not take its variables: it raised an exception."""


class CostlyTemplateError(Exception):
    """A template takes more time, memory or characters than it has."""


OUT_OF_MEMORY = "it takes more memory than it has"


def answer(request: tuple[Any, ...]) -> tuple[bytes, str]:
    """Answers a request of `sandbox`'s: a kind of its own, and a text. Nothing is raised."""
    try:
        if request[0] == "literals":
            return b"d", literals(request[1])
        _, source, variables, now, stand_ins, most = request
        return b"d", render(source, variables, datetime.fromisoformat(now), stand_ins, most)
    except BrokenTemplateError as error:
        return b"b", str(error)[:MESSAGE]
    except CostlyTemplateError as error:
        return b"c", str(error)
    except FailedTemplateError as error:
        return b"f", str(error)[:MESSAGE]
    except MemoryError:
        return b"c", OUT_OF_MEMORY
    except Exception as error:
        return b"f", type(error).__name__


def render(
    source: str,
    variables: Mapping[str, Any],
    now: datetime,
    stand_ins: StandIns | None = None,
    most: int = 1 << 28,
) -> str:
    """Renders a chat template.

    Args:
        source: The template, in Jinja.
        variables: The template's variables, of plain data.
        now: The time that its `strftime_now` tells.
        stand_ins: Texts to write instead of others where the template itself writes these; where it compares or looks
            up, its texts stay.
        most: Characters that it may write.

    Raises:
        BrokenTemplateError: The template does not compile.
        FailedTemplateError: It does not take the variables.
        CostlyTemplateError: It writes or takes too much.
    """
    template = _compiled(source, tuple(sorted((stand_ins or {}).items())))

    def strftime_now(form: str) -> str:
        return now.strftime(form)

    pieces, written = [], 0
    try:
        for piece in template.generate({"strftime_now": strftime_now, **variables}):
            pieces.append(piece)
            written += len(piece)
            if written > most:
                raise CostlyTemplateError(f"it writes more than {most} characters")
        return "".join(pieces)
    except CostlyTemplateError:
        raise
    except MemoryError as error:
        raise CostlyTemplateError(OUT_OF_MEMORY) from error
    except Exception as error:  # a template is a program, and fails in its own ways
        raise FailedTemplateError(str(error) or type(error).__name__) from error


def literals(source: str) -> str:
    """A template's own text and strings, with a character between them that none of them has.

    Raises:
        BrokenTemplateError: The template does not compile.
    """
    _compiled(source, ())
    tree = _environment().parse(source)
    strings = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join([*(node.data for node in tree.find_all(nodes.TemplateData)), *strings])


@functools.lru_cache(maxsize=16)
def _compiled(source: str, stand_ins: Pairs) -> Template:
    """A template, compiled once: that takes longer than all else that a short prompt needs."""
    environment = _environment()
    try:
        tree = environment.parse(source)
        if stand_ins:
            tree = _StandIns(dict(stand_ins)).visit(tree)
        return environment.from_string(tree)
    except TemplateSyntaxError as error:
        raise BrokenTemplateError(f"line {error.lineno}: {error.message}") from error
    except MemoryError as error:  # an expression of constants is computed here
        raise CostlyTemplateError(OUT_OF_MEMORY) from error
    except Exception as error:  # Python's own limits, such as those of nesting
        raise BrokenTemplateError(str(error) or type(error).__name__) from error


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja with what `transformers` adds to it and takes from it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, dict=_Dictionaries(), namespace=_Notes)
    return environment


class _Generation(Extension):
    """The block `{% generation %}`, which marks what the assistant says; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _StandIns(NodeTransformer):
    """Puts stand-ins into what a template writes, and leaves what it compares with and looks up."""

    def __init__(self, stand_ins: StandIns) -> None:
        self.pattern = re.compile("|".join(map(re.escape, sorted(stand_ins, key=len, reverse=True))))
        self.swap: Callable[[re.Match[str]], str] = lambda found: stand_ins[found[0]]

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        node.data = self.pattern.sub(self.swap, node.data)
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, str):
            node.value = self.pattern.sub(self.swap, node.value)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        node.value = self.visit(node.value)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        node.node = self.visit(node.node)
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        if node.name in ("default", "d", "join"):
            return self.generic_visit(node)
        if node.node is not None:
            node.node = self.visit(node.node)
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        if not isinstance(node.node, nodes.Getattr):  # a macro's arguments are written, a method's looked for
            return self.generic_visit(node)
        node.node = self.visit(node.node)
        return node


class _Dictionaries:
    """Makes dictionaries, as the type would, and offers nothing else of the type."""

    def __call__(self, *pairs: Any, **named: Any) -> dict[Any, Any]:
        return dict(*pairs, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class _Notes(Namespace):
    """A namespace whose names are the template's: none begins with an underscore, as Python's own do."""

    def __init__(*arguments: Any, **named: Any) -> None:
        self, *rest = arguments
        values = dict(*rest, **named)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no names that begin with an underscore, as {name!r} does")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter `tojson`, which escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: Any) -> None:
    raise TemplateError(str(message))
