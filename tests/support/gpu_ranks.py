"""A rank on a GPU that is not there: the fake GPU's engine, whose sums are the CPU's, over memory that the ranks share.

The processes, their commands, their start, their end and their faults are the real ones.
"""

from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fake_gpu import TRT, FakeDecoder, FakeDriver

from arriero.files.folders import rank_folder, read_spec
from arriero.runtime.backends.device import Device
from arriero.runtime.backends.tensorrt_decoder import TensorRTDecoder
from arriero.runtime.ranks.follower import bind_to_leader, follow_leader
from arriero.runtime.ranks.meeting import Meeting
from arriero.runtime.ranks.segment import Segment

BOOT = (
    "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given.pop('path')\n"
    "from gpu_ranks import follow; follow(**given)"
)


def open_rank(model: Path, bundle: Path, meeting: Meeting, communicator: Any) -> TensorRTDecoder:
    """Opens a rank's decoder: the bundle's description of the engine, the model's work."""
    _, own = rank_folder(bundle, read_spec(bundle), meeting.rank)
    driver = FakeDriver()
    engine = FakeDecoder(model / f"rank-{meeting.rank}", driver, group=meeting.segment.bytes)
    return TensorRTDecoder(TRT, Device(driver), engine, {}, own, communicator=communicator)  # type: ignore[arg-type]


def follow(*, model: str, bundle: str, rank: int, segment: int, channel: int, parent: int) -> None:
    """The program of a follower."""
    bind_to_leader(parent)
    shared = Segment(segment)
    shared.join(rank)
    meeting = Meeting(segment=shared, rank=rank, ranks=2, identifier=b"\1" * 128)
    follow_leader(Connection(channel), lambda: open_rank(Path(model), Path(bundle), meeting, object()), meeting)
