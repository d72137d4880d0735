"""What `pip wheel .` makes: the whole package, which says that it is typed and refuses to be published."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="not a checkout")
def test_the_wheel_has_every_file_of_the_package(tmp_path) -> None:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "megatron_dsrl"]
    files = subprocess.run(listing, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.split()
    for name in [*files, "pyproject.toml", "README.md", "LICENSE"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, tmp_path / "dist"], cwd=tmp_path, check=True, capture_output=True, timeout=240
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in packed if name.endswith(".dist-info/METADATA"))
    assert {name for name in packed if ".dist-info/" not in name} == set(files)
    assert "megatron_dsrl/py.typed" in packed
    assert "Classifier: Private :: Do Not Upload" in metadata and "Requires-Python: <3.13,>=3.12" in metadata
