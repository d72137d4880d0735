"""Where an engine is reached, and the key that it asks for."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class EngineAddress:
    """URL and key of one engine."""

    url: str
    """`http://host:port`."""
    key: str | None = field(default=None, repr=False)
    """Key of every call (SGLang's `--api-key`); None: the engine answers everybody."""

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of every call."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}
