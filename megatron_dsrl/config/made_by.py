"""Which command makes a file or folder that a run reads and that is not there yet."""

from collections.abc import Mapping
from pathlib import Path


def how_to_make(path: str, made_by: Mapping[str, str]) -> str | None:
    """What to tell the user of a missing path, such as "`bash examples/tiny_dsrl/run.sh` makes it".

    Args:
        path: file or folder that is missing.
        made_by: `RunConfig.made_by`.

    Returns:
        None if no command is known.
    """
    places = [Path(path), *Path(path).parents]
    command = next((command for place, command in made_by.items() if Path(place) in places), None)
    return command and f"`{command}` makes it"
