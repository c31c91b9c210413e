"""Random configurations, ours against `transformers`': equal, or refused by a field's name. Prints how many of each.

    python tests/fuzz/configs.py --count 1000 --seed 0 --logits 10

Every tenth (`--logits`) that both take is also built and run as two models whose logits are compared. Exits with 1
where one differs, is taken here alone, or is refused without its field's name.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from config_mutations import mutated
from config_oracle import outcome
from transformers.utils import logging

FINE = ("equal", "refused", "refused here")


def main() -> int:
    """Runs as many as asked and reports."""
    logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description="Random configurations, ours against transformers'")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logits", type=int, default=10, help="of how many one is run; 0 is none")
    arguments = parser.parse_args()
    kinds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        config, changed = mutated(seed)
        found = outcome(config, changed, logits=bool(arguments.logits) and seed % arguments.logits == 0)
        kinds[found.kind] += 1
        if found.kind not in FINE:
            print(f"seed {seed}: {found.kind}: {found.said}\n  {json.dumps(config)}")
        elif found.kind == "refused here":
            reasons[" ".join(found.said.split())[:110]] += 1
        else:
            reasons[f"{found.kind} {found.said}"] += found.kind == "refused"
    print(json.dumps(kinds, indent=1))
    for reason, count in reasons.most_common():
        print(f"{count:5} {reason}")
    return int(any(kind not in FINE for kind in kinds))


if __name__ == "__main__":
    sys.exit(main())
