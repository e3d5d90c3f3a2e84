"""Standard output and error, whatever the terminal's encoding."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def any_text() -> Iterator[None]:
    """Within the block, printing never fails for a letter: what an encoding does not have is written as an escape such
    as \\xe9 or \\u7d30.
    """
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [s.errors for s in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            if not stream.closed:
                stream.reconfigure(errors=errors)
