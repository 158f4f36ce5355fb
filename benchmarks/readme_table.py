"""The README's tables, each made from a file of results and put between its own markers."""

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def placed(text: str, name: str, table: str) -> str:
    """Put a table between the markers of its name, in the place of what is there.

    Raises:
        ValueError: the text has no such markers.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the README has no place for {name}: {begin} ... {end}")
    return f"{head}{begin}\n{table}\n{end}{tail}"


def place(name: str, table: str) -> None:
    """Put a table into the README."""
    README.write_text(placed(README.read_text(encoding="utf-8"), name, table), encoding="utf-8")
