"""Our Triton kernels' speed on this GPU, beside PyTorch's kernels for the same work, in one run at Llama 4's geometry.

Ours are launched as the TensorRT plugin launches them. Each contestant's calls, over several sets of inputs that are
together larger than the L2 cache, are captured in a CUDA graph; graphs are replayed in turns, each behind a flush of
that cache, and a figure is the median. Each result is checked before it is timed: a wrong kernel gets its error in the
table, no time, and exit status 1.

Attention: ours with RoPE or temperature, norm, and the cache's write; the peer is the fastest of PyTorch's
`scaled_dot_product_attention` back ends, given prepared queries and a bfloat16 cache, with nothing to write. Experts:
ours with routing, sorting and quantising; the peer is the faster of a grouped and of plain matrix products in bfloat16,
given tokens that are sorted already. Percents are of this card's own copy (bytes) and bfloat16 product (operations),
measured in the same run.

    python benchmarks/kernel_speed.py [--quick] [--seconds 90] [--json FILE] [--kernels FOLDER]
    python benchmarks/kernel_speed.py --compile-for 90 --kernels FOLDER    # on any machine; then carry the folder
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from support import attention_race, expert_race
from support.gpu_race import Row, ceilings

from arriero.plugins.gqa import plan as gqa_plan
from arriero.plugins.launch import Driver, Kernel, Kernels
from arriero.plugins.moe import plan as moe_plan
from arriero.spec.built_engine import Binary

EXPERTS = {True: (16,), False: (16, 128)}
"""Scout's, and Maverick's too unless the run is quick."""

LIST = "kernels.json"


def compile_one(job: tuple[str, Kernel, int]) -> tuple[Binary, bytes]:
    from arriero.plugins import triton_compiler as kernels

    module, kernel, capability = job
    compiled = kernels.compile_kernel(import_module(module), kernel, capability)
    return compiled.binary, compiled.cubin


def compile_all(capability: int, quick: bool, folder: Path, workers: int) -> None:
    """Writes the cubins, a list of them, and the compiler's version."""
    import triton

    jobs = {
        kernel.name: (gqa_plan.MODULE, kernel) for plan in attention_race.plans(capability) for kernel in plan.kernels
    }
    for plan in expert_race.plans(EXPERTS[quick], capability):
        jobs |= {kernel.name: (moe_plan.MODULE, kernel) for kernel in plan.kernels}
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        compiled = list(pool.map(compile_one, [(*job, capability) for job in jobs.values()]))
    folder.mkdir(parents=True, exist_ok=True)
    for binary, cubin in compiled:
        (folder / binary.file).write_bytes(cubin)
    content = {"triton": triton.__version__, "binaries": [asdict(binary) for binary, _ in compiled]}
    (folder / LIST).write_text(json.dumps(content, indent=1))


def races(kernels: Kernels, quick: bool, console: Console) -> Iterator[Row]:
    """All rows: Scout's experts, attention, Maverick's experts."""
    scout, *others = EXPERTS[quick]
    counts = expert_race.tokens(quick)
    yield from expert_race.rows(scout, counts, kernels, console.print)
    for shape in attention_race.shapes(quick):
        torch.cuda.empty_cache()
        yield from attention_race.rows(shape, kernels, console.print)
    for experts in others:
        torch.cuda.empty_cache()
        yield from expert_race.rows(experts, counts, kernels, console.print)


def figures(row: Row, copy: float, product: float) -> dict[str, float | str]:
    """Figures that a row's times stand for."""
    found: dict[str, float | str] = {}
    if row.peers:
        found["peer"] = min(row.peers, key=row.peers.__getitem__)
        found["peer_us"] = row.peers[str(found["peer"])]
    if row.ours is None:
        return found
    work, ceiling = (row.bytes, copy) if row.is_bound_by_bytes else (row.operations, product)
    found |= {"rate": work / row.ours * 1e6, "share": work / row.ours * 1e6 / ceiling}
    return found | ({"ratio": row.peers[str(found["peer"])] / row.ours} if row.peers else {})


def table(rows: list[Row], copy: float, product: float) -> Table:
    columns = ("op", "call", "stored", "error", "ours, µs", "rate", "of ceiling", "peer", "peer, µs", "peer / ours")
    made = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        found = figures(row, copy, product)
        peer = (str(found["peer"]), f"{found['peer_us']:.1f}") if row.peers else ("none runs", "")
        error = f"{row.error:.1e}" + ("" if row.is_right else " WRONG")
        if row.ours is None:
            made.add_row(row.op, row.shape, row.kind, error, "", "", "", *peer, "")
            continue
        rate = f"{found['rate'] / 1e9:.0f} GB/s" if row.is_bound_by_bytes else f"{found['rate'] / 1e12:.0f} TFLOP/s"  # type: ignore[operator]
        ratio = f"{found['ratio']:.2f}" if row.peers else ""
        made.add_row(row.op, row.shape, row.kind, error, f"{row.ours:.1f}", rate, f"{found['share']:.0%}", *peer, ratio)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description="Our kernels' speed beside PyTorch's.")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, and Scout's experts only")
    parser.add_argument("--seconds", type=float, default=90, help="begin no further race after that many")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kernels", type=Path, help="folder of cubins: read if there, else compiled into it")
    parser.add_argument("--compile-for", type=int, metavar="CAPABILITY", help="only compile, as for 90; needs no GPU")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    arguments = parser.parse_args()
    started = time.perf_counter()
    console = Console(width=150)
    folder = arguments.kernels or Path(tempfile.mkdtemp(prefix="kernel_speed."))
    if arguments.compile_for:
        compile_all(arguments.compile_for, arguments.quick, folder, arguments.workers)
        return 0
    if not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU here: this benchmark needs one")
    torch.set_default_device("cuda")
    torch.zeros(1)  # makes torch's context the current one
    device = torch.cuda.get_device_name()
    driver = Driver()
    if not (folder / LIST).exists():
        compile_all(driver.capability(), arguments.quick, folder, arguments.workers)
    listed = json.loads((folder / LIST).read_text())
    kernels = Kernels(driver, folder, [Binary(**each) for each in listed["binaries"]])
    console.print(f"{device}, kernels of Triton {listed['triton']}, PyTorch {torch.__version__}")
    console.print(f"{len(listed['binaries'])} kernels ready after {time.perf_counter() - started:.0f} s")
    copy, product = ceilings()
    console.print(f"copy {copy / 1e9:.0f} GB/s read and written, bf16 product {product / 1e12:.0f} TFLOP/s")

    rows: list[Row] = []
    try:
        for row in races(kernels, arguments.quick, console):
            rows.append(row)
            if time.perf_counter() - started > arguments.seconds:
                console.print(f"stopped after {arguments.seconds:.0f} s: the rows below are not all")
                break
    finally:  # an illegal access ends the run, not what it has found
        console.print(table(rows, copy, product))
        if arguments.json:
            found = [asdict(row) | {"is_right": row.is_right} | figures(row, copy, product) for row in rows]
            head = {"device": device, "torch": torch.__version__, "triton": listed["triton"]}
            arguments.json.write_text(json.dumps({**head, "copy": copy, "product": product, "rows": found}, indent=1))
    console.print(f"{len(rows)} rows in {time.perf_counter() - started:.0f} s")
    return 0 if all(row.is_right for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
