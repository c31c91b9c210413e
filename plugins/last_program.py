"""The question of a Triton program whether it is the last of those that share some work, and joins what they left.

Invariant: a counter is zero before and after a launch.
"""

import triton
import triton.language as tl


@triton.jit
def is_last(counter, count):
    """Whether this program is the last of `count` that ask, all of whose stores it then sees. The counter is 0 again.

    A barrier comes before the counting, since the atomic's thread speaks for the others of its program.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(counter, 0)
    return last
