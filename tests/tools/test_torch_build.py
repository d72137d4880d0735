"""Which build of torch the set-up takes: from package indices on this machine that hold small stand-ins for both."""

import functools
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_dsrl.doctor.doctor import read_pins

REPOSITORY = Path(__file__).parents[2]
VERSION = read_pins([REPOSITORY / "tools" / "requirements-cpu.lock"])["torch"]


def write_wheel(folder: Path, version: str) -> None:
    """A wheel of a package called torch, without any content."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        info = f"torch-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


class Index(ThreadingHTTPServer):
    """Serves a folder, whose listings are pages of a package index, and keeps the paths that were asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []

        class Handler(SimpleHTTPRequestHandler):
            def log_message(handler, *_: object) -> None:
                self.asked.append(handler.path)

        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=folder))

    def address(self, index: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{index}"


@pytest.fixture
def indices(tmp_path: Path) -> Iterator[Index]:
    """`pypi` has the build for CUDA, `cpu` the CPU build, both under the lock's version."""
    write_wheel(tmp_path / "indices" / "pypi" / "torch", VERSION)
    write_wheel(tmp_path / "indices" / "cpu" / "torch", f"{VERSION}+cpu")
    with Index(tmp_path / "indices") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=240)
    return folder


@pytest.fixture(params=["pip", "uv"])
def install_torch(request, indices, empty_environment) -> Iterator[Callable[..., tuple[str, str]]]:
    """Runs the set-up's step in an environment without torch; returns what it printed and the installed version."""

    def run(cpu_index: str, **settings: str) -> tuple[str, str]:
        if request.param == "uv":
            settings = {name.replace("PIP_EXTRA_INDEX_URL", "UV_INDEX"): value for name, value in settings.items()}
        variables = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(empty_environment),
            "PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": indices.address("pypi"), "UV_NO_CONFIG": "1",
            "UV_DEFAULT_INDEX": indices.address("pypi"), "UV_CACHE_DIR": str(empty_environment / "uv-cache"),
            "DSRL_VENV": str(empty_environment), "DSRL_TORCH_INDEX": cpu_index,
        }  # fmt: skip
        step = f"source {REPOSITORY}/tools/setup_cpu.sh; installer={request.param}; install_torch"
        done = subprocess.run(
            ["bash", "-c", step], env=variables | settings, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (installed,) = empty_environment.glob("lib/python*/site-packages/torch-*.dist-info")
        return done.stdout, installed.name.removeprefix("torch-").removesuffix(".dist-info")

    yield run
    for folder in empty_environment.glob("lib/python*/site-packages/torch-*.dist-info"):
        shutil.rmtree(folder)


def test_the_cpu_build_comes_from_pytorchs_index_without_any_setting(install_torch, indices) -> None:
    printed, installed = install_torch(indices.address("cpu"))
    assert installed == f"{VERSION}+cpu"
    assert "CUDA" not in printed and not [path for path in indices.asked if path.startswith("/pypi/torch/torch-")]


def test_the_users_own_index_of_the_cpu_build_is_enough(install_torch, indices) -> None:
    unreachable = "http://127.0.0.1:9/nothing-listens-here"
    printed, installed = install_torch(unreachable, PIP_EXTRA_INDEX_URL=indices.address("cpu"))
    assert installed == f"{VERSION}+cpu" and "CUDA" not in printed


def test_the_cuda_build_is_used_reported_and_kept_if_there_is_no_other(install_torch, indices) -> None:
    nowhere = "http://127.0.0.1:9/nothing-listens-here"
    printed, installed = install_torch(nowhere)
    assert installed == VERSION
    assert f"{nowhere} does not answer" in printed and "2.7 GB" in printed
    indices.asked.clear()
    assert install_torch(indices.address("cpu")) == ("", VERSION)
    assert indices.asked == []
