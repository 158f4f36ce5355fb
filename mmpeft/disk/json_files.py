"""JSON files that come from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmpeft.errors import MmpeftError


def read_object(file: Path, error: type[MmpeftError]) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        error: what to raise.

    Raises:
        MmpeftError: of the kind of `error`: the file holds something else.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as cause:
        raise error(f"{file.name} is no JSON: {str(cause)[:120]}") from cause
    if not isinstance(data, dict):
        raise error(f"{file.name} is no JSON object")
    return data
