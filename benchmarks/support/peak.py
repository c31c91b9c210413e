"""The peak of a process's own memory, watched from within: source that goes in front of what a benchmark runs alone.

Mapped files can be dropped by the system and are not counted. `before` is taken where the source stands; from then on
`peak[0]` holds the largest so far. Both are megabytes.
"""

WATCH = """
import threading
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1e3
before, peak, done = anonymous(), [0.0], threading.Event()
def watch():
    while not done.wait(0.01):
        peak[0] = max(peak[0], anonymous())
threading.Thread(target=watch, daemon=True).start()
"""
