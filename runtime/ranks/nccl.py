"""NVIDIA's NCCL, through its own library: the communicator over which the engines of a group's ranks add up.

Enters: an identifier that rank 0 makes and all ranks are given. Leaves: a communicator as TensorRT takes it. Nothing
but the seven functions used here is declared; they have been the same since NCCL 2.4.
"""

import ctypes
import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import SessionError

ID_SIZE = 128
"""Bytes of an identifier."""

INSTALL = "pip install nvidia-nccl-cu13"


class UniqueId(ctypes.Structure):
    """NCCL's identifier of a group, which is passed by value."""

    _fields_ = (("internal", ctypes.c_byte * ID_SIZE),)


class Nccl:
    """NCCL's library, with errors raised.

    Args:
        library: The loaded library; None looks for it.

    Raises:
        SessionError: It is not installed.
    """

    def __init__(self, library: Any = None) -> None:
        self.library = _load() if library is None else library
        self.library.ncclGetErrorString.restype = ctypes.c_char_p

    def call(self, function: str, *arguments: Any) -> None:
        """Calls a function of the library."""
        code = getattr(self.library, function)(*arguments)
        if code:
            said = self.library.ncclGetErrorString(code) or b"unknown error"
            raise SessionError(f"{function} failed: {said.decode(errors='replace')} ({code})")

    def unique_id(self) -> bytes:
        """Makes the identifier of a new group."""
        made = UniqueId()
        self.call("ncclGetUniqueId", ctypes.byref(made))
        return bytes(made.internal)


class Communicator:
    """One rank's place in a group. Making it waits for the others.

    Args:
        nccl: The library.
        identifier: The group's.
        ranks: Ranks of the group.
        rank: This one; its GPU's context is the calling thread's.
    """

    def __init__(self, nccl: Nccl, identifier: bytes, ranks: int, rank: int) -> None:
        self.nccl, self.handle = nccl, ctypes.c_void_p()
        self.lock = threading.Lock()
        given = UniqueId((ctypes.c_byte * ID_SIZE).from_buffer_copy(identifier))
        nccl.call("ncclCommInitRank", ctypes.byref(self.handle), ctypes.c_int(ranks), given, ctypes.c_int(rank))

    def capsule(self) -> Any:
        """The communicator as TensorRT's Python takes it."""
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return make(self.handle, None, None)

    def abort(self) -> None:
        """Ends what the GPU waits for; from any thread, while another waits for the GPU."""
        with self.lock:
            if self.handle:
                self.nccl.library.ncclCommAbort(self.handle)
                self.handle = ctypes.c_void_p()


def _load() -> ctypes.CDLL:
    for place in _places():
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise SessionError(f"the ranks of engines meet through NCCL, which is not installed here: {INSTALL}")


def _places() -> Iterator[str]:
    """The library's names: of its package, which need not be where the loader looks, and the system's."""
    found = importlib.util.find_spec("nvidia")
    for folder in () if found is None else found.submodule_search_locations or ():
        yield str(Path(folder) / "nccl" / "lib" / "libnccl.so.2")
    yield "libnccl.so.2"
