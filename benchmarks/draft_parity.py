"""EAGLE-3 heads that the `speculators` library writes, beside its own forward: the largest difference of logits.

    python benchmarks/draft_parity.py --count 12 --environment /tmp/speculators

Each head has a configuration drawn at random. The library makes and saves it, in an environment of its own that sees
this one's PyTorch behind its own packages, and computes its steps over random tokens and states in float32; Arriero
exports what was saved with a random Llama 4, and computes the same steps. Exits with 1 where one is off by more than
1e-5.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from support.apart import environment

VERSION = "0.9.0"
INSTALLS = (f"speculators=={VERSION}", f"hs-connectors=={VERSION}", "loguru", "pydantic-settings", "python-dotenv")
HIDDEN, LAYERS, VOCABULARY, LENGTH, STEPS = 96, 6, 120, 24, 4

PEER = """
import json, sys
from pathlib import Path
import numpy as np, torch
from speculators import SpeculatorsConfig, VerifierConfig
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from transformers import LlamaConfig

folder, drawn = Path(sys.argv[1]), json.loads(sys.argv[2])
torch.manual_seed(drawn["seed"])
layers = LlamaConfig(**drawn["layers"])
layers._attn_implementation = "eager"
speculators = SpeculatorsConfig(
    algorithm="eagle3", proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
    default_proposal_method="greedy", verifier=VerifierConfig(name_or_path=None, architectures=["Llama4ForCausalLM"]),
)
model = Eagle3DraftModel(Eagle3SpeculatorConfig(
    transformer_layer_config=layers, speculators_config=speculators, **drawn["head"])).eval().float()
for name, parameter in model.named_parameters():
    if parameter.ndim == 1:
        torch.nn.init.normal_(parameter, 1.0, 0.1)
    else:
        torch.nn.init.normal_(parameter, 0.0, parameter.shape[1] ** -0.5)
if model.t2d is not None:
    chosen = torch.randperm(layers.vocab_size)[: drawn["head"]["draft_vocab_size"]].sort().values
    model.t2d[:] = False
    model.t2d[chosen] = True
    model.d2t[:] = chosen - torch.arange(len(chosen))
logits = []
model.lm_head.register_forward_hook(lambda module, given, found: logits.append(found.detach()[0].clone()))
length, width = drawn["length"], model.fc.in_features
ids, states = torch.randint(3, layers.vocab_size, (1, length)), torch.randn(1, length, width)
with torch.no_grad():
    model(states, ids, torch.zeros(1, length, dtype=torch.long), ttt_steps=drawn["steps"])
model.save_pretrained(folder / "head")
np.savez(folder / "golden.npz", ids=ids[0].numpy(), states=states[0].numpy(), logits=torch.stack(logits).numpy())
"""


def drawn(seed: int) -> dict[str, Any]:
    """A configuration drawn at random."""
    rng = random.Random(seed)
    kv_heads, norm = rng.choice([1, 2, 4]), rng.choice(["", "fc_norm", "norm_before_fc"])
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    states = sorted(rng.sample(range(LAYERS + 1), rng.choice([1, 2, 3, 3])))
    return {
        "seed": seed,
        "length": LENGTH,
        "steps": STEPS,
        "layers": {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": rng.choice([32, 80, 128]),
            "num_hidden_layers": rng.choice([1, 1, 2, 3]),
            "num_key_value_heads": kv_heads,
            "num_attention_heads": kv_heads * rng.choice([1, 2, 3]),
            "head_dim": rng.choice([8, 16, 32]),
            "rms_norm_eps": rng.choice([1e-5, 1e-6]),
            "rope_parameters": rng.choice([llama3, {"rope_type": "default", "rope_theta": 10000.0}]),
            "max_position_embeddings": 2048,
            "pad_token_id": None,
        },
        "head": {
            "draft_vocab_size": rng.choice([VOCABULARY, 60]),
            "norm_before_residual": rng.random() < 0.5,
            "norm_output": rng.random() < 0.5,
            "eagle_aux_hidden_state_layer_ids": states,
            **({norm: True} if norm else {}),
        },
    }


def write_checkpoint(folder: Path) -> None:
    """A random Llama 4 of the size that the heads are for."""
    import torch
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        intermediate_size_mlp=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        max_position_embeddings=512,
        attention_chunk_size=64,
        pad_token_id=0,
    )
    Llama4ForCausalLM(config).save_pretrained(folder)


def difference(checkpoint: Path, folder: Path) -> float:
    """The largest difference between our logits and those of the library, over the head's steps from some places."""
    import arriero
    from arriero.export import export_checkpoint

    golden = np.load(folder / "golden.npz")
    ids, states_SW, expected = golden["ids"], golden["states"], golden["logits"]
    session = arriero.load(export_checkpoint(checkpoint, folder / "model", draft=folder / "head"), max_seq=64)
    assert session.draft is not None
    draft, worst = session.draft.backend, 0.0
    for place in range(0, LENGTH - STEPS, 5):
        binding, past_B = draft.bind(draft.caches(1, 64), slice(0, 1)), np.zeros(1, np.int32)
        begun = ids[None, : place + 1].astype(np.int64)
        logits_BV, hidden_BH = binding.begin(begun, past_B, np.array([place]), states_SW[None, : place + 1])
        worst = max(worst, float(np.abs(logits_BV[0] - expected[0, place]).max()))
        for step in range(1, STEPS):
            token = ids[place + step : place + step + 1].astype(np.int64)
            logits_BV, hidden_BH = binding.go_on(token, past_B + place + step, hidden_BH)
            worst = max(worst, float(np.abs(logits_BV[0] - expected[step, place]).max()))
    return worst


def main() -> int:
    """Compares as many heads as asked for."""
    parser = argparse.ArgumentParser(description="EAGLE-3 heads beside the speculators library")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--environment", type=Path, default=Path("build/speculators"))
    arguments = parser.parse_args()
    python = environment(arguments.environment, ["--no-deps", *INSTALLS])
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(Path(name) / "checkpoint")
        for seed in range(arguments.seed, arguments.seed + arguments.count):
            folder, config = Path(name) / str(seed), drawn(seed)
            folder.mkdir()
            command = [str(python), "-c", PEER, str(folder), json.dumps(config)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            found = difference(Path(name) / "checkpoint", folder)
            worst = max(worst, found)
            print(f"seed {seed}: {found:.1e}  {json.dumps(config['head'])}", flush=True)
    print(f"largest difference of {arguments.count} heads from speculators {VERSION}: {worst:.1e}")
    return int(worst > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
