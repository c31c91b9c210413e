"""A device that is not there: tensors that say they lie on it, and compute on the processor.

Under `LabelledDevice` a tensor that is moved to the device, or made on it, becomes a `Labelled` one around a tensor of
the processor. As on a GPU, an operator refuses tensors of two devices (but for numbers without dimensions), numpy does
not see what lies on the device, and memory there is counted while it is held.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("lazy")
"""A device that PyTorch knows by name without anything installed."""

MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Labelled(Tensor):
    """A tensor on the device; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Labelled":
        made: Labelled = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} beside the device")

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class LabelledDevice(TorchDispatchMode):
    """The device; a context.

    Attributes:
        uploads: Tensors moved to it, and their bytes.
        downloads: Tensors moved from it, single numbers too, and their bytes.
        most: Bytes held at once at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.uploads: list[int] = []
        self.downloads: list[int] = []
        self.held = self.most = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        wanted = dict(kwargs or {})
        tensors = [each for value in (*args, *wanted.values()) for each in tensors_of(value)]
        labelled = [each for each in tensors if isinstance(each, Labelled)]
        if not labelled and "device" not in wanted:
            return func(*args, **wanted)
        device = wanted.pop("device", None)
        to_device = device is not None and torch.device(device) == DEVICE
        if func not in MOVES and labelled:
            strangers = [each for each in tensors if not isinstance(each, Labelled) and each.ndim]
            assert not strangers, f"{func} of tensors on two devices: {[tuple(each.shape) for each in strangers]}"
        mine = {id(each.held): each for each in labelled}
        result = func(*map(bare, args), **{name: bare(value) for name, value in wanted.items()})
        if func is torch.ops.aten._local_scalar_dense.default and labelled:
            self.downloads.append(tensors[0].element_size())
        stays = to_device or (bool(labelled) and device is None)
        if func is torch.ops.aten._to_copy.default and device is not None and to_device != bool(labelled):
            (self.uploads if to_device else self.downloads).append(tensors[0].numel() * tensors[0].element_size())
        if isinstance(result, Tensor):
            return self._label(result, mine) if stays else result
        return tree_map(lambda each: self._label(each, mine) if stays and isinstance(each, Tensor) else each, result)

    def _label(self, tensor: Tensor, mine: Mapping[int, Labelled]) -> Tensor:
        if id(tensor) in mine:  # written in place
            return mine[id(tensor)]
        made, storage = Labelled(tensor), tensor.untyped_storage()
        if (key := storage._cdata) not in self._storages:
            self._storages.add(key)
            self.held += storage.nbytes()
            self.most = max(self.most, self.held)
            weakref.finalize(storage, self._free, key, storage.nbytes())
        return made

    def _free(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.held -= size


def tensors_of(value: Any) -> Sequence[Tensor]:
    """The tensors of an argument: itself, or a list's."""
    if isinstance(value, Tensor):
        return (value,)
    return [each for each in value if isinstance(each, Tensor)] if isinstance(value, list | tuple) else ()


def bare(value: Any) -> Any:
    """A labelled tensor's values, in a list too; others as they are."""
    if isinstance(value, Labelled):
        return value.held
    return [bare(each) for each in value] if isinstance(value, list) else value
