"""Names of data sets of the Hugging Face hub: `hf:OWNER/NAME` or `hf:OWNER/NAME:SPLIT`. No network."""

from __future__ import annotations

import re
from pathlib import Path

from swarm.errors import BadData

HUB_PREFIX = "hf:"
_SOURCE = re.compile(r"hf:(?P<name>[^:\s]{1,512})(?::(?P<split>[^\s]{1,128}))?")
_ID = re.compile(r"(?!.*(?:--|\.\.))(?!.*\.git$)[A-Za-z0-9_][\w.-]{0,95}(?:/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)


def parse_hub(text: str) -> tuple[str, str]:
    """The id of a data set and its split, `train` where none is said. A directory on this machine is one, too.

    Raises:
        BadData: the text can name none.
    """
    found = _SOURCE.fullmatch(text)
    if found is None or not (_is_id(found["name"]) or Path(found["name"]).is_dir()):
        raise BadData(f"'{text[:80]}' names no data set; use hf:OWNER/NAME or hf:OWNER/NAME:SPLIT")
    return found["name"], found["split"] or "train"


def _is_id(name: str) -> bool:
    return len(name) <= 96 and _ID.fullmatch(name) is not None and not any(part[-1] in "-." for part in name.split("/"))
