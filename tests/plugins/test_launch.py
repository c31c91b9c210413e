"""Launches packed for the driver: what it is given, and what a bundle of another version is told."""

import ctypes
import hashlib
from pathlib import Path
from typing import Any

import pytest

from arriero.errors import SessionError
from arriero.plugins.launch import Attribute, Driver, Kernels, Launch, Packed
from arriero.spec.built_engine import Binary


class Recorder:
    """A driver that notes launches."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_: 0

    def cuLaunchKernelEx(self, pointer: Any, function: Any, pointers: Any, _: Any) -> int:
        config = pointer._obj
        assert ctypes.sizeof(config) == 56
        assert ctypes.sizeof(Attribute) == 72
        attributes = [(each.id, each.value) for each in config.attributes[: config.count]]
        assert attributes in ([], [(6, 1)])
        kind = "early" if attributes else "after"
        self.launched.append((kind, *config.grid, *config.block, config.shared, config.stream, self.read(pointers)))
        return 0

    def read(self, pointers: Any) -> tuple[int, int]:
        address, count = (ctypes.c_uint64.from_address(pointers[index]).value for index in range(2))
        return address, count


def load(folder: Path) -> tuple[Recorder, Kernels]:
    (folder / "kernel").write_bytes(b"code")
    binaries = [
        Binary(
            kernel=name, capability=90, file="kernel", entry="kernel", parameters=("*fp32", "i32"), threads=128,
            shared=512, sha256=hashlib.sha256(b"code").hexdigest(), dependent=name == "second",
        )
        for name in ("first", "second")
    ]  # fmt: skip
    recorder = Recorder()
    return recorder, Kernels(Driver(recorder), folder, binaries)


def test_a_dependent_kernel_may_start_while_the_one_before_it_runs(tmp_path: Path) -> None:
    recorder, kernels = load(tmp_path)
    launches = [Launch(kernel=name, grid=(3, 2, 1), arguments=("x", 7)) for name in ("first", "second")]
    packed = Packed(kernels, launches, ["x"])
    for stream, x in ((11, 4096), (13, 8192)):
        packed.enqueue([x], stream)
        assert recorder.launched[-2:] == [
            (when, 3, 2, 1, 128, 1, 1, 512, stream, (x, 7)) for when in ("after", "early")
        ]


def test_a_bundle_of_another_version_is_told_to_be_built_again(tmp_path: Path) -> None:
    _, kernels = load(tmp_path)
    with pytest.raises(SessionError, match="the bundle has no kernel third for this GPU: build it again"):
        Packed(kernels, [Launch(kernel="third", grid=(1, 1, 1), arguments=())])
    with pytest.raises(SessionError, match="the bundle's kernel first is another version's: build it again"):
        Packed(kernels, [Launch(kernel="first", grid=(1, 1, 1), arguments=("x",))])
