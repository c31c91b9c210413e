"""All looks at a machine and a bundle, in order: what a later one needs stands before it.

Enters: a bundle, or nothing but this machine. Leaves: findings. Nothing is changed, and no look ends the others.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import ArrieroError, FolderError, shortened_text
from ...files.folders import check_no_rank, rank_folder, read_spec
from ...plugins.launch import Driver
from ...spec.folder import FolderSpec
from ...spec.types import Progress
from ..greedy import compare_greedy, compute_greedy, open_for_greedy, read_greedy
from .file_checks import check_files, check_hashes, check_small_files, check_trust
from .finding import Finding, found, ok, seen, unchecked
from .gpu_checks import check_bare_gpu, check_gpu, check_nccl
from .processor_checks import check_processor, check_thread_count
from .room_checks import check_disk, check_memory, check_port

DEFAULT_SLOTS = 16
"""Sequences at once that a server has where nothing is said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How the bundle is to be used, as `arriero serve` has it.

    Attributes:
        slots: Sequences at once; None takes a server's own number.
        max_seq: Tokens of a sequence; None takes what a session takes.
        threads: Threads of one operator; None takes the processors allowed.
        weights: Folder of the weight files, where they have moved.
        host: Address to listen on.
        port: Port.
    """

    slots: int | None = None
    max_seq: int | None = None
    threads: int | None = None
    weights: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000


def examine(
    bundle: str | Path | None = None,
    plan: Plan | None = None,
    *,
    open_driver: Callable[[], Driver] = Driver,
    progress: Progress = lambda phase, done, total: None,
) -> list[Finding]:
    """Looks at this machine, and at a bundle on it.

    Args:
        bundle: A bundle, or a group of them; None looks at the machine alone.
        plan: How it is to be used; None takes what `arriero serve` takes.
        open_driver: Opens CUDA's driver.
        progress: Called with the phase, the files done and the files in all.
    """
    plan, folder = plan or Plan(), None if bundle is None else Path(bundle)
    if folder is None:
        return [
            *check_processor(None),
            check_thread_count(plan.threads),
            check_disk(None),
            check_port(plan.host, plan.port),
            check_bare_gpu(open_driver),
        ]
    try:
        spec, parts = _open(folder)
    except (ArrieroError, OSError) as error:
        return [found("bundle", shortened_text(str(error), 500)), *examine(None, plan, open_driver=open_driver)]
    own = parts[0][1]
    findings = [_about(folder, spec), check_hashes(folder, progress), check_small_files(folder, spec)]
    for number, (path, part) in enumerate(parts):
        prefix = f"rank {number} " if spec.kind == "group" else ""
        findings += check_files(path, part, plan.weights, prefix)
        if part.engine is not None:
            looks = check_gpu(path, part, open_driver, number)
            findings += [dataclasses.replace(each, check=f"{prefix}{each.check}") for each in looks]
            findings.append(check_trust(path, part, prefix))
    if own.engine is not None and spec.kind == "group":
        findings.append(check_nccl())
    findings += check_processor(own)
    if own.engine is None:
        findings.append(check_thread_count(plan.threads))
        findings.append(check_memory(folder, spec, plan.slots or DEFAULT_SLOTS, plan.max_seq))
    findings += [check_disk(own), check_port(plan.host, plan.port)]
    is_ready = all(each.state != "found" or each.check in ("port", "memory", "tokenizer") for each in findings)
    findings.append(_token(folder, plan, is_ready=is_ready))
    return findings


def _open(folder: Path) -> tuple[FolderSpec, list[tuple[Path, FolderSpec]]]:
    """A bundle's spec, and the folders and specs of its parts.

    Raises:
        FolderError: It is no bundle, or damaged.
    """
    spec = read_spec(folder)
    check_no_rank(folder, spec)
    if not spec.target:
        raise FolderError(f"{folder} is a {spec.kind}, built for no machine yet: build it first (arriero build)")
    if spec.kind != "group":
        return spec, [(folder, spec)]
    return spec, [rank_folder(folder, spec, rank) for rank in range(spec.ranks)]


def _about(folder: Path, spec: FolderSpec) -> Finding:
    ranks = f", {spec.ranks} ranks" if spec.kind == "group" else ""
    return ok("bundle", f"{folder}, for {spec.target}{ranks}, of Arriero {spec.version}")


def _token(folder: Path, plan: Plan, *, is_ready: bool) -> Finding:
    """Compares a token computed here with the one recorded at build."""

    def look() -> Finding:
        expected = read_greedy(folder)
        if expected is None:
            return unchecked("token", "not recorded at build")
        if not is_ready:
            return unchecked("token", "mend what was found first")
        session = open_for_greedy(folder, plan.weights, plan.threads)
        wrong = compare_greedy(expected, compute_greedy(session, expected.prompt))
        if wrong is not None:
            return found(
                "token", f"{wrong}: copy or build the bundle again, and if it stays report processor and versions"
            )
        return ok("token", f"{expected.token} behind {len(expected.prompt)} fixed ones, as at build")

    return seen("token", look)
