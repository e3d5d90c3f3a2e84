"""`detect train --config FILE`: options in YAML, as timm's scripts have them."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from .configs import DETECTORS, TrainCfg


def read_words(file: str, known: Mapping[str, Any]) -> list[str]:
    """A file's options as words of a command line.

    The file is a mapping of options of the command, with `_` or `-` in their names, and of what --set takes
    (`lr: 2e-4`), directly or as a mapping under `set`.

    Args:
        known: the command's options and their defaults.

    Raises:
        ValueError: the file cannot be read, is not a mapping, or has an unknown key; with its name.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise ValueError(f"{file} cannot be read: {e.strerror or e}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ValueError(f"{file} is not YAML: {' '.join(str(e).split())}") from None
    content = {} if content is None else content
    if not isinstance(content, dict) or not isinstance(content.get("set") or {}, (dict, list)):
        raise ValueError(f"{file} is not a mapping of options such as `minutes: 10`")
    behind_set = {f.name for config in (*DETECTORS.values(), TrainCfg) for f in fields(config)}
    words: list[str] = []
    settings: list[str] = []
    for key, value in content.items():
        option = str(key).replace("-", "_")
        if option == "set":
            pairs = (
                value.items() if isinstance(value, dict) else [str(text).partition("=")[::2] for text in value or ()]
            )
            settings += (f"{name}={setting}" for name, setting in pairs)
        elif option == "config" or (option not in known and option not in behind_set):
            names = ", ".join(sorted({*known, *behind_set} - {"config"}))
            raise ValueError(f"{file}: unknown option {key!r}; there are {names}")
        elif option in behind_set:
            settings.append(f"{option}={value}")
        elif isinstance(known[option], bool):
            if not isinstance(value, bool):
                raise ValueError(f"{file}: {key} is {value!r}, expected true or false")
            words += [f"--{option.replace('_', '-')}"] if value else []
        elif value is not None:
            words.append(f"--{option.replace('_', '-')}={value}")
    return [*words, *(["--set", *settings] if settings else [])]
