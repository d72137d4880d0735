"""Generate configs/README.md and the JSON schemas in configs/schemas from the configuration classes.

    python tools/write_config_reference.py

tests/configs/test_reference.py compares them with the classes.
"""

from pathlib import Path

from megatron_dsrl.config.json_schema import as_text
from megatron_dsrl.config.kinds import FILES, KINDS
from megatron_dsrl.config.reference import reference

REPOSITORY = Path(__file__).resolve().parents[1]


def generated() -> dict[Path, str]:
    """The generated files and their text."""
    configs = REPOSITORY / "configs"
    schemas = {configs / "schemas" / f"{kind}.json": as_text(KINDS[kind].schema()) for kind in FILES}
    return {configs / "README.md": reference(), **schemas}


def main() -> None:
    """Write all generated files and print their paths."""
    for file, text in generated().items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
        print(file.relative_to(REPOSITORY))


if __name__ == "__main__":
    main()
