"""The steps over single tokens that have been before: each has an execution context of its own, and a graph.

Enters: the rows that a step is over, as a key. Leaves: a context that is bound to them, and from the second step on a
captured graph. Invariant: a context is not changed as long as the graph that was captured from it lives, which is tied
to the state that the context had then: NVIDIA's guide to TensorRT-RTX recommends one context a captured graph.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .device import DeviceGraph

Key = tuple[int, ...]


@dataclass(slots=True)
class TokenStep:
    """A step over some rows: the context that is bound to them, and the graph that was captured from it, if one was."""

    context: Any
    graph: DeviceGraph | None = None


class TokenSteps:
    """The steps of one decoder; the one used longest ago goes first.

    Args:
        make: Makes a context.
        most: Steps that are kept.
        ready: Contexts that are made at once.
    """

    def __init__(self, make: Callable[[], Any], most: int, ready: int = 1) -> None:
        self.make, self.most = make, most
        self.known: OrderedDict[Key, TokenStep] = OrderedDict()
        self.spare = [make() for _ in range(min(ready, most))]

    def find(self, key: Key) -> TokenStep | None:
        """The step over these rows, where there has been one."""
        if (found := self.known.get(key)) is not None:
            self.known.move_to_end(key)
        return found

    def add(self, key: Key, bind: Callable[[Any], None]) -> TokenStep:
        """Makes the step over these rows: a context that no graph needs, bound to them by `bind`."""
        while len(self.known) >= self.most:
            self.spare.append(self.known.popitem(last=False)[1].context)
        if not self.spare:
            self.spare.append(self.make())
        bind(self.spare[-1])
        self.known[key] = TokenStep(self.spare.pop())
        return self.known[key]

    def forget(self, key: Key | None = None) -> None:
        """Forgets a step, or all: what addresses they are bound to means nothing any more."""
        for each in [key] if key is not None else list(self.known):
            self.spare.append(self.known.pop(each).context)
