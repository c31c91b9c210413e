"""Triton's interpreter without the work that it does again at each call of a function: a third of a kernel's time.

It looks through `triton.language` for what it must replace whenever one Triton function calls another, makes a table of
types for each value, and reduces by exclusive or, which sorting does, value by value. To be used in a process that does
nothing but interpret: nothing is put back.
"""

from typing import Any

import numpy as np


def hasten() -> None:
    """Changes the interpreter of this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def patch_once(function: Any) -> Any:
        seen = frozenset(lang for lang in (tl, tl.core) if lang in function.__globals__.values())
        if seen not in patched:
            patched.add(seen)
            patch(function)
        return interpreter._LangPatchScope()

    find, found = interpreter._get_np_dtype, {}

    def find_once(kind: Any) -> Any:
        element = kind.element_ty if isinstance(kind, tl.block_type) else kind
        if isinstance(element, tl.pointer_type):
            return find(element)
        if element.name not in found:
            found[element.name] = find(element)
        return found[element.name]

    reduce = interpreter.ReduceOps.generic_reduce

    def reduce_at_once(self: Any, given: Any) -> Any:
        if self.combine_fn is not tl.standard._xor_combine:
            return reduce(self, given)
        (whole,) = given
        data = np.bitwise_xor.reduce(whole.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return [self.to_tensor(data, whole.dtype)]

    interpreter.ReduceOps.generic_reduce = reduce_at_once
    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, find_once
