"""The base of every configuration section: typed, immutable, and strict about its keys."""

import os.path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict

FolderPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A field with the path of a folder; a `~` at its beginning is the user's home."""


class Section(BaseModel):
    """A configuration section.

    Unknown keys are refused, values are never coerced from another kind (`"3"` is not an integer), and a section
    cannot change after it was built. The docstring under a field is its documentation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    def with_fields(self, section: str, **fields: Any) -> Self:
        """A copy in which these fields of one of its sections have other values, which are not checked."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=fields)})
