"""What a look at a data folder has to say, one sentence at a time."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know about their data.

    Attributes:
        level: "error" (cannot be trained on as it is), "warning" (probably not meant) or "note".
        file: name relative to the folder, "/" between the parts; None when it concerns the whole folder.
        message: what was found and what to do.
        topic: one word by which like findings are put together.
    """

    level: Level
    file: str | None
    message: str
    topic: str
