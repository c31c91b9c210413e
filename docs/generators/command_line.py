"""The command line's page, from the annotations of its typer commands."""

import inspect
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from typer.models import ArgumentInfo, OptionInfo

from arriero.cli.app import app

from .markdown import escape, table

OPTION = re.compile(r"(?<![\w`-])(--?[a-z][\w-]*)")
HEAD = """# Command line

`arriero --help` lists the verbs, and `arriero VERB --help` a verb's options; `python -m arriero` is the same command.
Results go to stdout, progress and messages to stderr. The verbs by what they are for:
[export](export.md), [calibrate](calibrate.md), [build](build.md), [run](run.md), [serve](serve.md),
[check and golden](check.md), [bench, compare and inspect](bench.md), [trend](nightly.md),
[pack and doctor](deploy.md). With `--json` results and errors are [JSON](json.md); `NO_COLOR` is heeded.

| exit code | |
|---|---|
| 0 | done |
| 1 | regressed (`check` only) |
| 2 | could not: one line on stderr says what was found and what to do |
| 3 | not enough data to tell (`check` only) |
| 130 | interrupted |

`arriero --install-completion` makes the shell complete verbs and options.

Where a table says nothing of a default, the option is off or not given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """An argument or an option of a verb."""

    name: str
    info: ArgumentInfo | OptionInfo
    kind: Any
    default: Any

    @property
    def is_argument(self) -> bool:
        """Whether it stands without a name."""
        return isinstance(self.info, ArgumentInfo)

    @property
    def is_required(self) -> bool:
        """Whether the verb refuses to run without it."""
        return self.default is inspect.Parameter.empty

    @property
    def names(self) -> tuple[str, ...]:
        """Its spellings, the long one first."""
        first = self.info.default  # where typer puts the first spelling of an annotated option
        given = (*([first] if isinstance(first, str) else []), *(self.info.param_decls or ()))
        dashed = self.name.replace("_", "-")
        implied = f"--{dashed}/--no-{dashed}" if self.kind is bool else f"--{dashed}"
        return given or (implied,)

    @property
    def is_repeated(self) -> bool:
        """Whether it may be given several times."""
        return typing.get_origin(self.kind) is list

    @property
    def metavar(self) -> str:
        """The kind of its value, in capitals."""
        kind = typing.get_args(self.kind)[0] if self.is_repeated else self.kind
        if typing.get_origin(kind) is typing.Literal:
            return "|".join(map(str, typing.get_args(kind)))
        return {"str": "TEXT", "int": "INTEGER", "float": "NUMBER"}.get(kind.__name__, kind.__name__.upper())

    @property
    def spelling(self) -> str:
        """How it is written on the command line, as code."""
        if self.is_argument:
            return f"`{self.name.upper()}`"
        value = "" if self.kind is bool else f" {self.metavar}"
        *others, last = sorted(self.names, key=len)
        return ", ".join([f"`{name}`" for name in others] + [f"`{last}{value}`"])

    @property
    def shown_default(self) -> str:
        """Its default where there is one worth showing."""
        shown = getattr(self.info, "show_default", True)
        if self.is_required:
            return "" if self.is_argument else "required"
        if isinstance(shown, str):
            return said(shown)
        return "" if self.default is None or self.kind is bool else f"`{self.default}`"


def page() -> str:
    """The whole page."""
    parts = [f"{HEAD} {_common()}\n"]
    for command in app.registered_commands:
        callback = command.callback
        assert callback is not None
        parts.append(_verb(command.name or callback.__name__.replace("_", "-"), callback))
    return "\n".join(parts)


def parameters(callback: Callable[..., Any] | None) -> list[Parameter]:
    """A verb's arguments, then its options, in their order."""
    assert callback is not None
    hints, found = typing.get_type_hints(callback, include_extras=True), []
    for name, parameter in inspect.signature(callback).parameters.items():
        annotated = typing.get_args(hints[name])
        info = next((each for each in annotated if isinstance(each, ArgumentInfo | OptionInfo)), None)
        if info is None:
            continue
        kinds = [annotated[0]]
        if isinstance(annotated[0], types.UnionType):
            kinds = [kind for kind in typing.get_args(annotated[0]) if kind is not types.NoneType]
        found.append(Parameter(name=name, info=info, kind=kinds[0], default=parameter.default))
    return sorted(found, key=lambda each: not each.is_argument)


def _common() -> str:
    """A sentence on the options that every verb has."""
    sets = [{each.names[0] for each in parameters(command.callback)} for command in app.registered_commands]
    return f"Every verb has {', '.join(f'`{name}`' for name in sorted(set.intersection(*sets)))}."


def _verb(name: str, callback: Callable[..., Any]) -> str:
    every = parameters(callback)
    usage = [f"arriero {name}"]
    for each in every:
        if each.is_argument:
            usage.append(each.name.upper() if each.is_required else f"[{each.name.upper()}]")
        elif each.is_required:
            usage.append(f"{each.names[0]} {each.metavar}{' …' if each.is_repeated else ''}")
    parts = [said(" ".join(part.split())) for part in inspect.cleandoc(callback.__doc__ or "").split("\n\n")]
    rows = [(each.spelling, each.shown_default, said(each.info.help or "")) for each in every]
    lines = " ".join([*usage, "[OPTIONS]"])
    parts += [f"```text\n{lines}\n```", table(("option", "default", ""), rows)]
    return "\n\n".join([f"## {name}", *parts]) + "\n"


def said(text: str) -> str:
    """A help text as Markdown, the options that it names as code, but for those in code already."""
    parts = text.split("`")
    return escape("`".join(part if index % 2 else OPTION.sub(r"`\1`", part) for index, part in enumerate(parts)))
