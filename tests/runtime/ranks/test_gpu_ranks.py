"""Ranks on GPUs: engines of two ranks built here, NCCL's calls over a stand-in, processes over GPUs that are none."""

import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from gpu_ranks import BOOT, open_rank

import arriero
from arriero.engine import Options, build_bundle
from arriero.errors import SessionError
from arriero.export import export_checkpoint
from arriero.files.folders import read_spec
from arriero.measuring.summary import summarise
from arriero.runtime.ranks.followers import Followers
from arriero.runtime.ranks.group_decoder import GroupDecoder
from arriero.runtime.ranks.meeting import Meeting
from arriero.runtime.ranks.nccl import Communicator, Nccl
from arriero.runtime.ranks.segment import BEGUN_AT, HEAD, Segment
from arriero.runtime.session import Session
from arriero.runtime.state import Limits

NCCL = r"""
#include <string.h>
typedef struct { char internal[128]; } Id;
static int aborted = 0, seen[4];
int ncclGetUniqueId(Id* id) { memset(id->internal, 7, 128); id->internal[127] = 9; return 0; }
int ncclCommInitRank(void** made, int ranks, Id id, int rank) {
    if (rank >= ranks) return 4;
    seen[0] = ranks; seen[1] = rank; seen[2] = id.internal[0]; seen[3] = id.internal[127];
    *made = (void*)0x1234560; return 0;
}
int ncclCommAbort(void* given) { if (given == (void*)0x1234560) aborted++; return 0; }
const char* ncclGetErrorString(int code) { return code == 4 ? "invalid argument" : "?"; }
int count_aborted(void) { return aborted; }
int look(int index) { return seen[index]; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A library with NCCL's functions, which says what it was given."""
    folder = tmp_path_factory.mktemp("nccl")
    (folder / "nccl.c").write_text(NCCL)
    subprocess.run(["cc", "-shared", "-fPIC", folder / "nccl.c", "-o", folder / "libnccl.so.2"], check=True)
    return ctypes.CDLL(str(folder / "libnccl.so.2"))


def test_a_communicator_is_made_given_and_ended_by_nccls_own_calls(library: Any) -> None:
    nccl = Nccl(library)
    identifier = nccl.unique_id()
    assert identifier == b"\7" * 127 + b"\t"
    made = Communicator(nccl, identifier, 2, 1)
    assert [library.look(index) for index in range(4)] == [2, 1, 7, 9]
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    assert pointer(made.capsule(), None) == 0x1234560
    made.abort()
    made.abort()  # a second time is none
    assert library.count_aborted() == 1
    with pytest.raises(SessionError, match=r"ncclCommInitRank failed: invalid argument \(4\)"):
        Communicator(nccl, identifier, 2, 5)


Built = tuple[Path, Path, Path]


def use_up(session: Session) -> None:
    """Runs until the group ends; what was sent before is still done."""
    for _ in range(100):
        session.logits([[5, 6, 7]])


@pytest.fixture(scope="module")
def built(make_llama4: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A small model, its two ranks, and their engines for two GPUs."""
    folder = tmp_path_factory.mktemp("engines")
    make_llama4(num_hidden_layers=1).save_pretrained(folder / "checkpoint")
    model = export_checkpoint(folder / "checkpoint", folder / "model")
    group = export_checkpoint(model, folder / "group", tp=2)
    options = Options(max_batch=2, max_seq=64, max_prefill=16)
    return model, group, build_bundle(group, folder / "engines", target="tensorrt-rtx:sm89,sm120", options=options)


def test_engines_of_two_ranks_have_a_collective_for_each_sum(built: Built) -> None:
    _, _, bundle = built
    assert read_spec(bundle).target == "tensorrt-rtx:sm89,sm120"
    for rank in (0, 1):
        spec = read_spec(bundle / f"rank-{rank}")
        assert spec.engine is not None
        assert spec.engine.capabilities == (89, 120)
        assert {cache.shape for cache in spec.engine.caches} == {(1, 16, 16)}  # one of two kv heads
        layers = json.loads((bundle / f"rank-{rank}" / "layers.json").read_text())
        sums = [layer["name"].partition("/AllReduce")[0] for layer in layers if layer["kind"] == "comm_allreduce"]
        assert sorted(sums) == sorted(2 * ["layers.0/self_attn.o_proj", "layers.0/feed_forward", "lm_head"])  # profiles
    found = summarise(bundle)["ranks"]
    assert found["sums"] == {"a_step": 3, "bytes_per_token": 2 * 32 * 4, "bytes_per_logits": 97 * 4}
    assert [rank["engine"]["capabilities"] for rank in found["each"]] == [[89, 120]] * 2


@pytest.mark.parametrize("is_heard", [True, False], ids=["heard of by who watches", "by who sends"])
def test_ranks_on_gpus_give_the_models_logits_and_end_together(built: Built, library: Any, is_heard: bool) -> None:
    model, group, bundle = built
    segment = Segment.create(2, patience=60)
    segment.join(0)
    meeting = Meeting(segment=segment, rank=0, ranks=2, identifier=b"\1" * 128)
    meeting.communicator = Communicator(Nccl(library), meeting.identifier, 2, 0)
    aborted = library.count_aborted()
    settings = [{"model": str(group), "bundle": str(bundle), "rank": 1, "segment": segment.descriptor}]
    capsule, lost = meeting.communicator.capsule(), meeting.lost if is_heard else lambda rank: None
    decoder = GroupDecoder(
        bundle,
        read_spec(bundle).model,
        splits_caches=True,
        cores=None,
        start=lambda: Followers(bundle, settings, [segment.descriptor], 60, lost, meeting.silent, BOOT),
        open_local=lambda: open_rank(group, bundle, meeting, capsule),
        meeting=meeting,
    )
    assert [context.communicator for context in decoder.local.execution.engine.contexts] == [capsule] * 3
    plain = arriero.load(model, max_seq=64, threads=1)
    session = Session(decoder, plain.text, plain.defaults, Limits(64, 2))
    ids = np.random.default_rng(0).integers(3, 97, (2, 30))
    assert np.abs(session.logits(ids, [30, 7]) - plain.logits(ids, [30, 7])).max() < 1e-4
    assert session.generate([5, 6, 7], 6, temperature=0) == plain.generate([5, 6, 7], 6, temperature=0)
    os.kill(decoder.processes[0], signal.SIGKILL)
    with pytest.raises(SessionError, match="rank 1 was ended by SIGKILL; the group has ended, load it again"):
        use_up(session)
    end = time.monotonic() + 60
    while library.count_aborted() == aborted:  # what a GPU waits for is ended too
        assert time.monotonic() < end
        time.sleep(0.05)


def test_ranks_meet_before_they_join_and_not_without_one_that_failed(library: Any) -> None:
    segment = Segment.create(2, patience=1)
    meetings = [Meeting(segment=segment, rank=rank, ranks=2, identifier=b"\1" * 128) for rank in (0, 1)]
    with ThreadPoolExecutor(2) as pool, patch("arriero.runtime.ranks.meeting.Nccl", lambda: Nccl(library)):
        capsules = list(pool.map(Meeting.join, meetings))
    assert len(capsules) == 2
    alone = Segment.create(2, patience=1)
    alone.end(4, 1)
    with pytest.raises(SessionError, match="rank 1 has failed"):
        Meeting(segment=alone, rank=0, ranks=2, identifier=b"\1" * 128).join()


def test_the_rank_behind_is_the_one_that_does_not_answer() -> None:
    segment = Segment.create(3, patience=1)
    for rank, steps in enumerate((5, 4, 5)):
        meeting = Meeting(segment=segment, rank=rank, ranks=3, identifier=b"\1" * 128)
        for _ in range(steps):
            meeting.arrive()
    meeting.silent()
    assert meeting.fault == "rank 1 does not answer"


def test_the_beginning_of_a_step_moves_no_turn_of_the_sums() -> None:
    segment = Segment.create(2, patience=1)
    before = segment.bytes[HEAD : HEAD + BEGUN_AT].tobytes()
    Meeting(segment=segment, rank=0, ranks=2, identifier=b"\1" * 128).arrive()
    assert segment.bytes[HEAD : HEAD + BEGUN_AT].tobytes() == before
    assert [segment.steps_begun(rank) for rank in (0, 1)] == [1, 0]
