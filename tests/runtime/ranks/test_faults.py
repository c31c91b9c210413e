"""A rank that dies, hangs, fails or meets other weights ends its group with one line that names it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arriero
from arriero.engine import build_bundle
from arriero.errors import ArrieroError, SessionError
from arriero.export import export_checkpoint
from arriero.runtime.ranks.group_decoder import GroupDecoder


@pytest.fixture(scope="module")
def groups(make_llama4: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Bundles of two ranks of two models that differ in their weights alone."""
    folder = tmp_path_factory.mktemp("faults")
    made = []
    for seed in (0, 1):
        make_llama4(seed=seed, num_hidden_layers=1).save_pretrained(folder / f"checkpoint-{seed}")
        model = export_checkpoint(folder / f"checkpoint-{seed}", folder / f"model-{seed}")
        group = export_checkpoint(model, folder / f"group-{seed}", tp=2)
        made.append(build_bundle(group, folder / f"bundles-{seed}"))
    return made


@pytest.fixture(scope="module")
def four(groups: list[Path]) -> Path:
    """A bundle of four ranks, an expert each."""
    group = export_checkpoint(groups[0].parent / "model-0", groups[0].parent / "group", tp=1, ep=4)
    return build_bundle(group, groups[0].parent / "four")


def load(group: Path, patience: float = 60) -> tuple[arriero.runtime.Session, GroupDecoder]:
    session = arriero.load(group, max_seq=64, threads=4, patience=patience)
    assert isinstance(session.decoder, GroupDecoder)
    session.logits([[5, 6, 7]])
    return session, session.decoder


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def use_up(session: arriero.runtime.Session) -> None:
    """Runs until the group ends; what was sent before is still done."""
    for _ in range(100):
        session.logits([[5, 6, 7]])


def assert_gone(processes: list[int]) -> None:
    end = time.monotonic() + 60
    while any(map(is_running, processes)):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_rank_that_dies_ends_the_group(groups: list[Path]) -> None:
    session, decoder = load(groups[0])
    assert session.fault is None
    os.kill(decoder.processes[0], signal.SIGKILL)
    end = time.monotonic() + 60
    while session.fault is None:  # without a step
        assert time.monotonic() < end
        time.sleep(0.01)
    said = f"{groups[0]}: rank 1 was ended by SIGKILL; the group has ended, load it again"
    assert session.fault == said
    with pytest.raises(SessionError) as error:
        use_up(session)
    assert session.fault == str(error.value)
    assert str(error.value) == said
    with pytest.raises(SessionError, match="rank 1 was ended by SIGKILL"):
        session.generate([5, 6], max_new_tokens=2)
    assert_gone(decoder.processes)
    again, _ = load(groups[0])  # the remedy
    assert again.logits([[5, 6, 7]]).shape == (1, 3, 97)


def test_a_rank_that_hangs_ends_the_group(groups: list[Path]) -> None:
    session, decoder = load(groups[0], patience=1)
    os.kill(decoder.processes[0], signal.SIGSTOP)
    with pytest.raises(SessionError, match="rank 1 does not answer; the group has ended, load it again"):
        session.logits([[5, 6, 7]])
    assert_gone(decoder.processes)


@pytest.mark.parametrize(("number", "said"), [(signal.SIGKILL, "was ended by SIGKILL"), (signal.SIGSTOP, "not answer")])
def test_the_rank_that_was_first_is_named_not_those_that_failed_in_its_wake(
    four: Path, number: signal.Signals, said: str
) -> None:
    for rank in (1, 3):
        session, decoder = load(four, patience=1)
        os.kill(decoder.processes[rank - 1], number)
        with pytest.raises(SessionError, match=f"four: rank {rank} .*{said}; the group has ended, load it again$"):
            use_up(session)
        assert_gone(decoder.processes)


def test_a_rank_that_fails_says_why(groups: list[Path]) -> None:
    session, decoder = load(groups[0])
    state = session.start(1)
    with pytest.raises(SessionError, match="rank 1 has failed: KeyError: 99; the group has ended"):
        decoder.gathered(("read", 99, 0, 0, 1), lambda: None)
    with pytest.raises(SessionError, match="rank 1 has failed"):
        session.decode(state, [5])
    assert_gone(decoder.processes)


def test_an_interrupted_step_leaves_the_ranks_in_step(groups: list[Path]) -> None:
    session, decoder = load(groups[0])
    expected = session.logits([[5, 6, 7]])
    own, local = decoder.local, decoder.local.bind
    state = session.start(1)

    def interrupted(*given: Any) -> Any:
        signal.raise_signal(signal.SIGINT)  # the main thread gets it while it waits
        time.sleep(0.2)
        return local(*given)

    own.bind = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        session.prefill(state, [[5, 6, 7]])
    own.bind = local  # type: ignore[method-assign]
    assert np.array_equal(session.logits([[5, 6, 7]]), expected)


def test_a_rank_of_another_group_is_refused(groups: list[Path], tmp_path: Path) -> None:
    for rank in (0, 1):
        mixed = tmp_path / f"mixed-{rank}"
        shutil.copytree(groups[0], mixed)
        shutil.rmtree(mixed / f"rank-{rank}")
        shutil.copytree(groups[1] / f"rank-{rank}", mixed / f"rank-{rank}")
        with pytest.raises(ArrieroError, match=f"rank {rank}: .* has other weights or another graph than its group"):
            arriero.load(mixed, threads=2)


def test_no_rank_outlives_a_leader_that_is_killed(groups: list[Path]) -> None:
    code = (
        "import sys, time, arriero\n"
        "session = arriero.load(sys.argv[1], max_seq=64, threads=2)\n"
        "session.logits([[5, 6, 7]])\n"
        "print(*session.decoder.processes, flush=True)\n"
        "time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(groups[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as leader:
        assert leader.stdout is not None
        processes = [int(word) for word in leader.stdout.readline().split()]
        assert len(processes) == 1
        assert all(map(is_running, processes))
        leader.kill()
    assert_gone(processes)


def test_ranks_end_with_the_session_that_nobody_holds(groups: list[Path]) -> None:
    session, decoder = load(groups[0])
    processes = decoder.processes
    del session, decoder
    assert_gone(processes)
