"""Conversations that reach many replicas, the ways to route them, and replicas that are only a model of one.

Enters: a trace's settings, and what a replica's steps take. Leaves: what each request would have seen. The trace is
synthetic, and stated: system prompts are shared, of a popularity that falls with their rank (Zipf); conversations come
at random (Poisson) and have a geometric number of turns; lengths of questions and answers are log-normal, pauses
exponential. A model's replica is a flight: in a step, whoever waits is read into free slots, and whoever is on board
gets a token.
"""

import heapq
import random
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WORDS = ("list", "map", "file", "thread", "number", "clock", "error", "socket", "value", "name", "class", "module")
BLOCK = 32
"""Tokens of a block that a replica knows or does not."""

SPREAD = 4
"""Requests by which a replica may be ahead of the idlest before load comes first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """A trace's settings: conversations a second, their number, and their parts in words, tokens and seconds."""

    rate: float
    conversations: int
    systems: int = 12
    system_words: int = 120
    turns: float = 3.0
    message_words: float = 16.0
    answer_tokens: float = 20.0
    pause: float = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """When it begins, its system prompt's number, and a turn's words, tokens of the answer, and pause behind it."""

    start: float
    system: int
    turns: tuple[tuple[str, int, float], ...]


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) + str(rng.randrange(100)) for _ in range(count))


def system_prompt(traffic: Traffic, number: int) -> str:
    return f"System {number}. " + words(random.Random(number), traffic.system_words)


def conversations(traffic: Traffic) -> list[Conversation]:
    """The trace, the same for the same settings."""
    rng, now, made = random.Random(traffic.seed), 0.0, []
    weights = [1 / (rank + 1) for rank in range(traffic.systems)]
    for _ in range(traffic.conversations):
        now += rng.expovariate(traffic.rate)
        count = 1
        while rng.random() > 1 / traffic.turns and count < 8:
            count += 1
        turns = tuple(
            (
                words(rng, max(3, min(60, round(rng.lognormvariate(np.log(traffic.message_words), 0.6))))),
                max(4, min(64, round(rng.lognormvariate(np.log(traffic.answer_tokens), 0.5)))),
                rng.expovariate(1 / traffic.pause),
            )
            for _ in range(count)
        )
        made.append(Conversation(start=now, system=rng.choices(range(traffic.systems), weights)[0], turns=turns))
    return made


class Router:
    """Chooses a replica: at random, in turn, or the one that knows most of a beginning while its load allows."""

    def __init__(self, way: str, replicas: int, seed: int = 0) -> None:
        self.way, self.rng, self.count = way, random.Random(seed), 0
        self.loads = [0] * replicas
        self.known: list[set[int]] = [set() for _ in range(replicas)]

    def choose(self, pieces: tuple[int, ...]) -> int:
        """The replica of a prompt, given the hashes of its beginnings, shortest first."""
        self.count += 1
        if self.way == "random":
            chosen = self.rng.randrange(len(self.loads))
        elif self.way == "round robin":
            chosen = self.count % len(self.loads)
        else:
            least = min(self.loads)
            free = [index for index, load in enumerate(self.loads) if load - least < SPREAD]
            matched = {index: sum(piece in self.known[index] for piece in pieces) for index in free}
            chosen = min(free, key=lambda index: (-matched[index], self.loads[index], self.rng.random()))
            self.known[chosen].update(pieces)
        self.loads[chosen] += 1
        return chosen

    def done(self, replica: int) -> None:
        self.loads[replica] -= 1


def beginnings(text: str, size: int = 240) -> tuple[int, ...]:
    """Hashes of a text's beginnings, a piece longer each."""
    made, last = [], 0
    for start in range(0, len(text) - size + 1, size):
        made.append(last := hash((last, text[start : start + size])))
    return tuple(made)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """One request: when it was asked, had its first token and its last; its tokens, and those that were known."""

    asked: float
    first: float
    last: float
    prompt: int
    known: int
    new: int


def summary(seen: list[Seen]) -> dict[str, float]:
    """Answered tokens a second, the 95th percentile and the mean of seconds to the first token, and the share known."""
    firsts = [each.first - each.asked for each in seen]
    span = max(each.last for each in seen) - min(each.asked for each in seen)
    return {
        "tokens_per_second": sum(each.new for each in seen) / span,
        "ttft_mean": float(np.mean(firsts)),
        "ttft_p95": float(np.percentile(firsts, 95)),
        "known": sum(each.known for each in seen) / sum(each.prompt for each in seen),
    }


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a replica's step, of each row in it, of each prompt token, and of each request."""

    step: float
    row: float
    token: float
    request: float


@dataclass(slots=True)
class Rider:
    """A request at a model's replica: seconds, tokens, its prompt's blocks, and its conversation's number."""

    asked: float
    prompt: int
    blocks: tuple[tuple[int, int], ...]
    new: int
    conversation: int
    first: float = 0.0
    known: int = 0
    left: int = 0


@dataclass(slots=True, eq=False)
class ModelReplica:
    """A flight of a number of slots that knows a number of blocks, the ones used last."""

    costs: Costs
    slots: int
    capacity: int
    waiting: list[Rider] = field(default_factory=list)
    riding: list[Rider] = field(default_factory=list)
    known: "OrderedDict[tuple[int, int], None]" = field(default_factory=OrderedDict)
    is_stepping: bool = False

    def board(self) -> float:
        """Takes on board who waits; returns the seconds of the step that begins."""
        read = boarded = 0
        while self.waiting and len(self.riding) < self.slots:
            rider = self.waiting.pop(0)
            count = next((i for i, block in enumerate(rider.blocks) if block not in self.known), len(rider.blocks))
            rider.known = min(count * BLOCK, rider.prompt - 1)
            rider.left = rider.new
            read, boarded = read + rider.prompt - rider.known, boarded + 1
            self.riding.append(rider)
        costs = self.costs
        return costs.step + costs.row * len(self.riding) + costs.token * read + costs.request * boarded

    def keep(self, blocks: tuple[tuple[int, int], ...]) -> None:
        """Keeps what has been answered; the ones used longest ago go."""
        for block in blocks:
            self.known[block] = None
            self.known.move_to_end(block)
        while len(self.known) > self.capacity:
            self.known.popitem(last=False)

    def land(self, now: float) -> Iterator[Rider]:
        """Ends a step: a token each; gives those that have their last."""
        for rider in list(self.riding):
            rider.first = rider.first or now
            rider.left -= 1
            if rider.left <= 0:
                self.riding.remove(rider)
                self.keep(rider.blocks)
                yield rider


def simulate(
    traffic: Traffic, replicas: int, way: str, costs: Costs, *, slots: int, capacity: int, tokens_a_word: float
) -> dict[str, float]:
    """The summary of a trace over replicas that are models."""
    made, router = conversations(traffic), Router(way, replicas)
    fleet = [ModelReplica(costs=costs, slots=slots, capacity=capacity) for _ in range(replicas)]
    texts = [system_prompt(traffic, each.system) for each in made]
    lengths = [len(text.split()) * tokens_a_word for text in texts]
    turn, homes, seen = [0] * len(made), [0] * len(made), []
    events: list[tuple[float, int, Any]] = [(each.start, index, None) for index, each in enumerate(made)]
    heapq.heapify(events)
    shared = int(traffic.system_words * tokens_a_word) // BLOCK
    while events:
        now, index, replica = heapq.heappop(events)
        if replica is None:  # a question
            conversation = made[index]
            message, new, _ = conversation.turns[turn[index]]
            texts[index] += " " + message
            lengths[index] += len(message.split()) * tokens_a_word
            prompt = round(lengths[index])
            blocks = tuple(
                (-1 - conversation.system if block < shared else index, block) for block in range(prompt // BLOCK)
            )
            homes[index] = router.choose(beginnings(texts[index]))
            target = fleet[homes[index]]
            target.waiting.append(Rider(asked=now, prompt=prompt, blocks=blocks, new=new, conversation=index))
        else:
            target = fleet[replica]
            target.is_stepping = False
            for rider in target.land(now):
                each = rider.conversation
                router.done(replica)
                seen.append(
                    Seen(
                        asked=rider.asked,
                        first=rider.first,
                        last=now,
                        prompt=rider.prompt,
                        known=rider.known,
                        new=rider.new,
                    )
                )
                lengths[each] += rider.new
                texts[each] += " answer" * rider.new
                pause = made[each].turns[turn[each]][2]
                turn[each] += 1
                if turn[each] < len(made[each].turns):
                    heapq.heappush(events, (now + pause, each, None))
        if not target.is_stepping and (target.waiting or target.riding):
            target.is_stepping = True
            heapq.heappush(events, (now + target.board(), len(made), fleet.index(target)))
    return summary(seen)
