"""Quality of the trained tiny Llama 4 once quantised: Arriero's recipes beside NVIDIA's ModelOpt.

Both quantisers get the same calibration windows (of the text that `examples/tiny-llama4` was trained on), and both
results are measured on the same rows of text that was held out. The reference is the checkpoint's bfloat16 weights in
float32 arithmetic, run by `transformers`. ModelOpt quantises that `transformers` model in place and simulates the
formats in float32; Arriero's model folders run as a user runs them, with `arriero.load`. Measured are the mean
Kullback-Leibler divergence of the next token's distribution from the reference's, in nats a token, and the rise of the
perplexity with its standard error over the rows: on a model as small as this the rise is noisy, the divergence is not.
Arriero's unquantised model stands first, to show how far two ways of computing one model are apart.

ModelOpt's configurations are run as they are shipped, and INT4 also in Arriero's groups of 64. Its SmoothQuant and AWQ
rescale linears, not Llama 4's experts, whose quantisers only round. The last columns are read from the quantised
models: how many linears have a quantised weight, of those there are with routers and LM head, and how many scales the
gate and up weights of the eight experts of a layer have, and their input (`token`: each token its own).

    pip install nvidia-modelopt requests
    python benchmarks/modelopt_quality.py [--windows 12] [--rows 24] [--json figures.json]
"""

import argparse
import contextlib
import copy
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Llama4ForCausalLM
from transformers.utils import logging

import arriero
from arriero.calibration import calibrate_model, fp8, int4, int8
from arriero.calibration.presets import units
from arriero.export import export_checkpoint
from arriero.files.folders import read_spec
from arriero.files.safetensors import open_shard
from arriero.walk.windows import read_windows

try:
    import modelopt.torch.quantization as mtq
except ImportError as error:
    sys.exit(f"modelopt cannot be imported ({error}): pip install nvidia-modelopt requests")

TINY = Path(__file__).parent.parent / "examples" / "tiny-llama4"

ROW = 512
"""Tokens that are measured at once: four of the model's attention chunks."""

RECIPES = {
    "int8": int8(),
    "int8, static": int8(activations="static"),
    "fp8": fp8(),
    "fp8, dynamic": fp8(activations="dynamic"),
    "int4": int4(),
}
CONFIGS = (
    "INT8_DEFAULT",
    "INT8_SMOOTHQUANT",
    "FP8_DEFAULT",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "INT4_AWQ",
)

EXPERTS = "layers.1.feed_forward.experts"
"""The experts whose scales are counted; the layers are alike."""

Logits = Callable[[NDArray[np.int64]], Tensor]
"""From ids [S] to logits [S, V], float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """One line of the table.

    Attributes:
        quantiser: `Arriero` or `ModelOpt`.
        recipe: Its name there.
        divergence: Nats a token from the reference.
        perplexity: On the held-out rows.
        rise: Rise of the perplexity, as a share of the reference's.
        error: Standard error of the rise over the rows.
        seconds: Seconds of quantising, with reading the model.
        linears: Linears with a quantised weight, of those in the model.
        weight_scales: Scales of one layer's experts' gate and up weights.
        input_scales: Scales of their input, `token` where each token has its own, or `none`.
    """

    quantiser: str
    recipe: str
    divergence: float
    perplexity: float
    rise: float
    error: float
    seconds: float
    linears: str
    weight_scales: str
    input_scales: str


def write_texts(folder: Path) -> tuple[Path, Path]:
    """Writes the held-out text, and a twelfth of what the model was trained on, for calibration."""
    sys.path.insert(0, str(TINY))
    from corpus import documents, held_out_text

    held_out, training = folder / "held_out.txt", folder / "training.txt"
    held_out.write_text(held_out_text(), "utf-8")
    texts = [document.text for document in documents() if not document.is_held_out][::12]
    training.write_text("\n\n\n".join(texts), "utf-8")
    return held_out, training


def held_out_rows(model: Path, text: Path, count: int) -> NDArray[np.int64]:
    """Ids [R, ROW], evenly spaced over the text."""
    ids = arriero.load(model).text.encode(text.read_text("utf-8"), special_tokens=False)
    rows = np.array(ids[: len(ids) // ROW * ROW], dtype=np.int64).reshape(-1, ROW)
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ruler:
    """The reference that quantised models are held against.

    Attributes:
        rows_RS: Held-out ids.
        exact: The reference's logits [S, V] of each row.
    """

    rows_RS: NDArray[np.int64]
    exact: list[Tensor]

    def measure(self, found: Logits, **names: Any) -> Quality:
        """The figures of one model."""
        lines = []
        for row_S, exact_SV in zip(self.rows_RS, self.exact, strict=True):
            p_SV, q_SV = log_probabilities(exact_SV), log_probabilities(found(row_S))
            next_S1 = torch.from_numpy(row_S[1:, None])
            losses = [-log_SV.gather(1, next_S1).mean() for log_SV in (p_SV, q_SV)]
            lines.append([*losses, (p_SV.exp() * (p_SV - q_SV)).sum(-1).mean()])
        exact_R, loss_R, divergence_R = np.array(lines, dtype=np.float64).T
        difference_R = loss_R - exact_R
        return Quality(
            divergence=float(divergence_R.mean()),
            perplexity=float(np.exp(loss_R.mean())),
            rise=float(np.expm1(difference_R.mean())),
            error=float(difference_R.std(ddof=1) / np.sqrt(len(difference_R))),
            **names,
        )


def log_probabilities(logits_SV: Tensor) -> Tensor:
    """Log-probabilities of each next token in the row, [S - 1, V], in float64: divergences can be as small as 1e-12."""
    return logits_SV[:-1].double().log_softmax(-1)


def transformers_logits(model: torch.nn.Module) -> Logits:
    """Runs a `transformers` model."""

    def logits(row: NDArray[np.int64]) -> Tensor:
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(row[None]), use_cache=False).logits[0]

    return logits


def arriero_logits(folder: Path) -> Logits:
    """Runs a model folder."""
    session = arriero.load(folder)
    return lambda row: torch.from_numpy(session.logits(row[None])[0])


def groups_of_64(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with weights in groups of 64 instead of 128, which does not divide this model's width of 192."""
    config = copy.deepcopy(config)
    for entry in config["quant_cfg"]:
        if "block_sizes" in (entry.get("cfg") or {}):
            entry["cfg"]["block_sizes"][-1] = 64
    return config


def modelopt_model(config: dict[str, Any], ids_WS: NDArray[np.int64]) -> Llama4ForCausalLM:
    """The checkpoint in float32, quantised by ModelOpt."""

    def run(model: torch.nn.Module) -> None:
        logits = transformers_logits(model)
        for window in ids_WS:
            logits(window)

    return mtq.quantize(load_reference(), config, run)


def load_reference() -> Llama4ForCausalLM:
    """The checkpoint's bfloat16 weights in float32 arithmetic."""
    return Llama4ForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager").eval()


def modelopt_coverage(model: torch.nn.Module) -> dict[str, str]:
    """The last columns of a model that ModelOpt has quantised."""
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    on = [module for module in linears if hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled]
    experts = model.get_submodule(f"model.{EXPERTS}")

    def scales(quantiser: Any) -> str:
        if not quantiser.is_enabled:
            return "none"
        return "token" if quantiser.amax is None else str(quantiser.amax.numel())

    return {
        "linears": f"{len(on)}/{len(linears)}",
        "weight_scales": scales(experts.gate_up_proj_weight_quantizer),
        "input_scales": scales(experts.gate_up_proj_input_quantizer),
    }


def arriero_coverage(folder: Path) -> dict[str, str]:
    """A model folder's quantised linears and scales."""
    spec = read_spec(folder)
    sizes: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        sizes |= {name: math.prod(region.shape) for name, region in open_shard(path).tensors.items()}
    linears = [name for name, _ in units(spec.model) if not name.endswith(".experts")]
    on = [name for name in linears if f"model.{name}.weight_scale" in sizes]
    is_dynamic = spec.recipe is not None and spec.recipe.activations == "dynamic"
    return {
        "linears": f"{len(on)}/{len(linears)}",
        "weight_scales": str(sizes.get(f"model.{EXPERTS}.gate_up_proj_scale", "none")),
        "input_scales": "token" if is_dynamic else str(sizes.get(f"model.{EXPERTS}.hidden_scale", "none")),
    }


def compare(windows: int, count: int) -> Iterator[Quality]:
    """The lines of the table as they are measured."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        held_out, training = write_texts(folder)
        model = export_checkpoint(TINY, folder / "model")
        ids_WS = read_windows(model, [training], read_spec(model).model, windows).ids_WS
        rows_RS, reference = held_out_rows(model, held_out, count), transformers_logits(load_reference())
        ruler = Ruler(rows_RS=rows_RS, exact=[reference(row_S) for row_S in rows_RS])
        yield ruler.measure(
            arriero_logits(model), quantiser="Arriero", recipe="bf16", seconds=0.0, **arriero_coverage(model)
        )
        for label, recipe in RECIPES.items():
            started = time.perf_counter()
            quantised = calibrate_model(model, folder / label, recipe=recipe, data=ids_WS)
            seconds = time.perf_counter() - started
            coverage = arriero_coverage(quantised)
            yield ruler.measure(
                arriero_logits(quantised), quantiser="Arriero", recipe=label, seconds=seconds, **coverage
            )
        configs = {label: getattr(mtq, f"{label}_CFG") for label in CONFIGS}
        configs["INT4_AWQ, groups of 64"] = groups_of_64(mtq.INT4_AWQ_CFG)
        for label, config in configs.items():
            started = time.perf_counter()
            peer = modelopt_model(config, ids_WS)
            seconds = time.perf_counter() - started
            coverage = modelopt_coverage(peer)
            yield ruler.measure(
                transformers_logits(peer), quantiser="ModelOpt", recipe=label, seconds=seconds, **coverage
            )


def draw(lines: Sequence[Quality]) -> Table:
    """The table, narrow enough for a terminal of 80 columns."""
    title = f"tiny-llama4 on held-out text, perplexity {lines[0].perplexity:.2f}"
    table = Table("recipe", "KL, nats", "rise, %", "s", "linears", "scales", title=title, box=box.SIMPLE, padding=0)
    for quantiser, group in itertools.groupby(lines, lambda line: line.quantiser):
        table.add_row(f"[bold]{quantiser}[/bold]")
        for line in group:
            rise = f"{100 * line.rise:+.2f} ± {100 * line.error:.2f}"
            covered = line.linears, f"{line.weight_scales} / {line.input_scales}"
            table.add_row(line.recipe, f"{line.divergence:.2e}", rise, f"{line.seconds:.1f}", *covered)
        table.add_section()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Arriero's recipes and ModelOpt's on the tiny Llama 4.")
    parser.add_argument("--windows", type=int, default=12, help="calibration windows")
    parser.add_argument("--rows", type=int, default=24, help="held-out rows of 512 tokens, 2 at least")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    if arguments.rows < 2:
        parser.error(f"--rows is {arguments.rows}: give 2 at least, the error is taken over them")
    logging.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):  # ModelOpt tells what it does there
        lines = list(compare(arguments.windows, arguments.rows))
    Console().print(draw(lines))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
