"""The sum over ranks on the CPU against its meaning, over the op's table of cases, by two processes that meet."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from arriero.plugins.all_reduce.cases import CASES, Case
from arriero.plugins.all_reduce.meaning import all_reduce
from arriero.plugins.cpu.library import DOMAIN, library
from arriero.runtime.ranks.segment import Segment

CAPACITY = 1000
"""Values of a slot in these tests: larger cases take several turns."""

RANK = """
import sys
import numpy as np
from pathlib import Path
from arriero.plugins.all_reduce.cases import CASES
sys.path.insert(0, sys.argv[3])
from test_all_reduce import add_up
from arriero.runtime.ranks.segment import Segment

segment, folder = Segment(int(sys.argv[1])), Path(sys.argv[2])
for case in CASES:
    if case.attributes.ranks == 2:
        total = add_up(segment, case.parts()[1], ranks=2, rank=1)
        np.save(folder / f"{case.name}.npy", total)
"""


def add_up(segment: Segment, part: np.ndarray, ranks: int, rank: int) -> np.ndarray:
    """A rank's node, run alone."""
    segment.join(rank)
    part_info, total_info = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(part.shape)) for name in ("part", "total")
    )
    group_info = onnx.helper.make_tensor_value_info("group", onnx.TensorProto.UINT8, [len(segment.bytes)])
    node = onnx.helper.make_node("AllReduce", ["part", "group"], ["total"], domain=DOMAIN, ranks=ranks, rank=rank)
    graph = onnx.helper.make_graph([node], "sum", [part_info, group_info], [total_info])
    opsets = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid(DOMAIN, 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library()))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    io = session.io_binding()
    io.bind_cpu_input("part", part)
    io.bind_ortvalue_input("group", ort.OrtValue.ortvalue_from_numpy(segment.bytes))  # the same memory
    io.bind_output("total")
    session.run_with_iobinding(io)
    found: np.ndarray = io.copy_outputs_to_cpu()[0]
    return found


@pytest.fixture(scope="module")
def totals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[np.ndarray]]:
    """What two processes give, case by case."""
    folder = tmp_path_factory.mktemp("ranks")
    segment = Segment.create(2, patience=100, capacity=CAPACITY)
    command = [sys.executable, "-c", RANK, str(segment.descriptor), str(folder), str(Path(__file__).parent)]
    with subprocess.Popen(command, pass_fds=[segment.descriptor]) as other:
        cases = [case for case in CASES if case.attributes.ranks == 2]
        found = {case.name: [add_up(segment, case.parts()[0], ranks=2, rank=0)] for case in cases}
        assert other.wait(120) == 0
    for case in cases:
        found[case.name].append(np.load(folder / f"{case.name}.npy"))
    segment.close()
    return found


@pytest.mark.parametrize("case", [case for case in CASES if case.attributes.ranks == 2], ids=lambda case: case.name)
def test_two_ranks_get_the_sum_of_their_parts(totals: dict[str, list[np.ndarray]], case: Case) -> None:
    first, second = totals[case.name]
    assert np.array_equal(first, second)
    parts = case.parts()
    assert np.array_equal(first, parts[0] + parts[1])  # in the order of the ranks, to the bit
    assert np.abs(first - all_reduce(parts)).max() < 1e-6


def test_a_sum_over_one_rank_is_its_part() -> None:
    case = next(case for case in CASES if case.attributes.ranks == 1)
    segment = Segment.create(1, patience=1)
    assert np.array_equal(add_up(segment, case.parts()[0], ranks=1, rank=0), all_reduce(case.parts()))


@pytest.mark.parametrize(
    ("offset", "value", "ranks", "said"),
    [
        (0, 1, 2, "group is no memory that ranks share"),
        (8, 3, 2, "group is of 3 ranks, and the graph of 2"),
        (16, 7, 2, "group has not the size that it claims"),
        (0, None, 65, "attribute ranks is 65, and must be from 1 to 64"),
    ],
)
def test_memory_that_is_no_group_is_refused(offset: int, value: int | None, ranks: int, said: str) -> None:
    segment = Segment.create(2, patience=1)
    if value is not None:
        segment.bytes[offset] = value
    with pytest.raises(Exception, match=f"arriero.cpu AllReduce: {said}"):
        add_up(segment, np.ones(3, np.float32), ranks=ranks, rank=0)


def test_a_rank_that_waits_gives_up_in_one_line() -> None:
    ones = np.ones(3, np.float32)
    silent = Segment.create(2, patience=0.3)
    with pytest.raises(Exception, match="AllReduce: rank 1 does not answer"):
        add_up(silent, ones, ranks=2, rank=0)
    assert silent.fault == (2, 1)
    dead = Segment.create(2, patience=100)
    with subprocess.Popen(["true"]) as gone:
        pass
    dead.bytes[4096 + 128 + 8 : 4096 + 128 + 12] = np.frombuffer(np.int32(gone.pid).tobytes(), np.uint8)
    with pytest.raises(Exception, match="AllReduce: rank 1 has ended"):
        add_up(dead, ones, ranks=2, rank=0)
    told = Segment.create(2, patience=100)
    told.end(4, 1)
    with pytest.raises(Exception, match="AllReduce: rank 1 has failed"):
        add_up(told, ones, ranks=2, rank=0)
