import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from arriero.errors import CheckpointError
from arriero.files.safetensors import identity, open_shard


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


shapes = st.lists(st.integers(0, 5), max_size=3)
dtypes = st.sampled_from([np.float32, np.float16, np.int8, np.int64])


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(shapes, dtypes), min_size=1, max_size=6))
def test_regions_are_where_the_safetensors_library_puts_the_data(tmp_path_factory, tensors) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(-9, 9, shape).astype(dtype) for name, (shape, dtype) in tensors.items()}
    arrays.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("shard") / "x.safetensors"
    safetensors.numpy.save_file(arrays, path)
    shard, data = open_shard(path), path.read_bytes()
    assert shard.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        region = shard.tensors[name]
        assert region.shape == array.shape
        assert data[region.offset : region.offset + region.size] == array.tobytes()


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data: bytes) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("shard") / "x.safetensors"
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        open_shard(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 40) | st.text(max_size=5) | st.sampled_from(["F32", "BF16"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=4), json_values, max_size=4), st.integers(0, 64))
def test_an_accepted_header_lies_inside_the_file_without_gaps(tmp_path_factory, header, size: int) -> None:  # type: ignore[no-untyped-def]
    path = write(tmp_path_factory.mktemp("shard") / "x.safetensors", header, bytes(size))
    try:
        shard = open_shard(path)
    except CheckpointError:
        return
    end = path.stat().st_size - size
    for region in sorted(shard.tensors.values(), key=lambda region: (region.offset, region.size)):
        assert region.offset == end
        end += region.size
        assert math.prod(region.shape) >= 0
    assert end == path.stat().st_size


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"a": entry([2], 0, 8)}, bytes(4), "truncated"),
        ({"a": entry([2], 0, 8)}, bytes(12), "too long"),
        ({"a": entry([2], 0, 12)}, bytes(12), "12 bytes for F32 [2]"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12), "overlaps"),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12), "gap"),
        ({"a": entry([2], 8, 0)}, bytes(8), "data_offsets [8, 0]"),
        ({"a": entry([-2], 0, 8)}, bytes(8), "shape [-2]"),
        ({"a": entry([2], 0, 8, "F99")}, bytes(8), "dtype 'F99'"),
        ({"a": 3}, b"", "the entry 3"),
        ([1], b"", "not an object"),
        (b"{oops", b"", "damaged header"),
        (b'{"a": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}, "a": 1}', b"", "twice"),
    ],
)
def test_a_damaged_header_is_named(tmp_path: Path, header: object, data: bytes, said: str) -> None:
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match="download it again") as caught:
        open_shard(path)
    assert said in str(caught.value)


def test_a_header_of_too_many_tensors_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {f"t{number}": entry([0], 0, 0) for number in range(100_003)}, b"")
    with pytest.raises(CheckpointError, match=r"damaged header .more than 100000 tensors.: download it again"):
        open_shard(path)


def test_a_header_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="truncated"):
        open_shard(path)
    with path.open("r+b") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    with pytest.raises(CheckpointError, match="claims 200000000"):
        open_shard(path)


def test_the_identity_tells_other_data_and_survives_a_copy(tmp_path: Path) -> None:
    header = {"a": entry([1000], 0, 4000)}
    first = write(tmp_path / "a", header, bytes(4000))
    copy = write(tmp_path / "b", header, bytes(4000))
    other = write(tmp_path / "c", header, bytes(3999) + b"x")
    assert identity(first) == identity(copy) != identity(other)
