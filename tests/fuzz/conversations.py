"""Chat templates against `transformers`: random conversations through each, text for text and id for id.

    PYTHONPATH=tests/support python tests/fuzz/conversations.py [--pairs 1000] [--seed 0]

Each pair of a template and a conversation is written by both. Counted are those that are equal, those that both refuse,
those that we alone refuse (with a `SessionError`, each kind listed), and those that we alone take, because
`transformers` would print Python's lists or leave out what was said. Anything else is an error, and ends the run.
"""

import argparse

from chat_pairs import compare_pairs

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--pairs", type=int, default=1000)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()
for kind, count in compare_pairs(arguments.pairs, arguments.seed).most_common():
    print(f"{count:6}  {kind}")
