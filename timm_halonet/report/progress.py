"""Progress on standard error, by huggingface_hub's tqdm, and lines next to it.

A bar is drawn where standard error is a terminal. Logs get lines only. HF_HUB_DISABLE_PROGRESS_BARS=1 turns bars off.
"""

import sys
from typing import Any, TextIO


def progress_bar(*args: Any, shown: bool = True, **kwargs: Any) -> Any:
    """A bar, with tqdm's arguments, that goes when it is done.

    Args:
        shown: False for none, whatever standard error is.
    """
    from huggingface_hub.utils import tqdm

    return tqdm(*args, **{"leave": False, "disable": None if shown else True, **kwargs})


def say(line: str, file: TextIO | None = None) -> None:
    """Prints a line at once, on standard output or `file`; bars make room for it."""
    from huggingface_hub.utils import tqdm

    file = file or sys.stdout
    tqdm.write(line, file=file)
    file.flush()
