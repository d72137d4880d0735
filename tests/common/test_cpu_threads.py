"""Which threads a run uses on a CPU."""

import os
import subprocess
import sys

import pytest

from megatron_dsrl.common.cpu_threads import cpu_threads, has_bfloat16, usable_cores

TINY, SMALL, BILLIONS = 800_000, 135_000_000, 8_000_000_000


@pytest.mark.parametrize(
    ("parameters", "cores", "environment", "trainer", "engine"),
    [
        (TINY, 2, {}, 2, 1),
        (TINY, 64, {}, 2, 1),
        (SMALL, 2, {}, 2, 2),
        (SMALL, 64, {}, 64, 6),
        (BILLIONS, 64, {}, 64, 64),
        (BILLIONS, 64, {"LOCAL_WORLD_SIZE": "4"}, 16, 16),
        (BILLIONS, 2, {"LOCAL_WORLD_SIZE": "4"}, 1, 1),
        (BILLIONS, 64, {"OMP_NUM_THREADS": "1"}, 1, 1),  # as torchrun sets it
        (BILLIONS, 64, {"OMP_NUM_THREADS": "8,2", "LOCAL_WORLD_SIZE": "4"}, 8, 8),
        (TINY, 64, {"OMP_NUM_THREADS": "8"}, 2, 1),
    ],
)
def test_threads_follow_cores_and_model_size(parameters, cores, environment, trainer, engine) -> None:
    threads = cpu_threads(parameters, cores=cores, environment=environment)
    assert (threads.trainer, threads.engine) == (trainer, engine)


def test_what_is_configured_holds() -> None:
    threads = cpu_threads(TINY, trainer=6, engine=3, cores=2, environment={"OMP_NUM_THREADS": "1"})
    assert (threads.trainer, threads.engine) == (6, 3)


@pytest.mark.parametrize(("quota", "most"), [("max 100000", None), ("150000 100000", 1), ("50000 100000", 1)])
def test_a_containers_limit_counts(tmp_path, quota, most) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    unlimited = usable_cores(tmp_path / "none")
    assert usable_cores(tmp_path / "cpu.max") == (unlimited if most is None else most) >= 1


@pytest.mark.parametrize(
    ("line", "has"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16", True),
        ("flags\t\t: fpu amx_bf16", True),
        ("Features\t: fp asimd bf16", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("model name\t: bf16 in a name", False),
    ],
)
def test_bfloat16_in_hardware(tmp_path, line, has) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n{line}\n")
    assert has_bfloat16(tmp_path / "cpuinfo") is has


@pytest.mark.parametrize(
    ("variables", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_a_command_limits_spinning_before_torch_is_loaded(variables: dict[str, str], spins: str) -> None:
    code = (
        "import os, sys; from megatron_dsrl.cli import main; before = 'torch' in sys.modules; "
        "main(['completion', 'bash']); print(before, os.environ.get('GOMP_SPINCOUNT'))"
    )
    unset = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    completed = subprocess.run([sys.executable, "-c", code], env=unset | variables, capture_output=True, text=True)
    assert completed.stdout.splitlines()[-1] == f"False {spins}", completed.stderr
