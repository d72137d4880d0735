"""A sweep: the same few overrides and several seeds over several configurations."""

from typing import Annotated

from pydantic import Field

from megatron_dsrl.config.section import FolderPath, Section


class SweepRunConfig(Section):
    """One method of a sweep."""

    config: str | Annotated[list[str], Field(min_length=1)]
    """Its configuration file, or several, where the later wins, relative to the sweep's file."""

    overrides: list[str] = Field(default_factory=list)
    """`key.path=value`, after the sweep's own."""


class SweepConfig(Section):
    """Runs to be made and compared."""

    output_dir: FolderPath
    """Folder for all runs, the table and the figure."""

    seeds: list[int] = Field(min_length=1)
    """Every method is run with each seed."""

    baseline: str
    """The method that the others are compared with."""

    overrides: list[str] = Field(default_factory=list)
    """`key.path=value` for every run."""

    runs: dict[str, SweepRunConfig] = Field(min_length=1)
    """The methods by name, in the order of the table."""
