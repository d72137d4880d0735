"""A server process that is started before its arguments are known."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil
import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.scratch_folder import NEW_SECONDS
from megatron_dsrl.rollout.engines.server import EngineServer
from megatron_dsrl.rollout.engines.server_process import ServerProcess, end_processes, starting_server
from tests.support.disk import fill_disk, small_disk
from tests.support.engine import processes_of_group, tiny_run_config
from tests.support.waiting import wait_until


def test_a_process_that_never_serves_is_ended(tiny_model_folder) -> None:
    """As when the run folder turns out to belong to another run."""
    with pytest.raises(UserError), starting_server(tiny_run_config(tiny_model_folder)) as server:
        assert server is not None and server.process.poll() is None
        raise UserError("the run folder holds another run")
    assert not psutil.pid_exists(server.process.pid) and not server.scratch.path.exists()


@pytest.mark.parametrize("engine", [{"urls": ["http://127.0.0.1:30000"]}, {"tensor_parallel_size": 2}])
def test_only_owners_of_an_engine_start_one(tiny_model_folder, monkeypatch, engine) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with starting_server(tiny_run_config(tiny_model_folder, **engine)) as server:
        assert server is None


def test_a_process_that_its_parent_has_left_behind_has_ended_as_well() -> None:
    """It is no longer a descendant of the server, and takes a while to end, as large processes do."""
    many_pages = f"{sys.executable} -c 'x = bytearray(3 * 10**8); x[::4096] = x[::4096]; import time; time.sleep(60)'"
    server = subprocess.Popen(["sh", "-c", f"({many_pages} &); sleep 60"], start_new_session=True)
    wait_until(lambda: any(each.memory_info().rss > 2e8 for each in processes_of_group(server.pid)), 20)
    end_processes(server)
    assert processes_of_group(server.pid) == []


def test_what_it_wrote_before_it_served_is_in_the_log(tmp_path) -> None:
    """Here Python itself does not start; usually it is an import that fails."""
    log = tmp_path / "engines" / "engine_0.log"
    server = EngineServer({}, {"PYTHONHOME": "/nowhere"}, log, startup_timeout_seconds=30.0)
    server.start()
    with pytest.raises(UserError, match="exited with status 1(.|\n)*No module named 'encodings'"):
        server.wait_until_ready()
    assert "/nowhere" in log.read_text()
    server.stop()


def test_a_server_that_ends_because_the_disk_is_full_is_not_restarted(tmp_path) -> None:
    with small_disk(tmp_path / "disk"):
        log = tmp_path / "disk" / "engine_0.log"
        server = EngineServer({}, {"PYTHONHOME": "/nowhere"}, log, startup_timeout_seconds=30.0)
        server.start()
        fill_disk(log.parent)
        with pytest.raises(UserError, match=f"^{log}: the disk is full"):
            server.wait_until_ready()
        server.stop()


def test_a_temporary_folder_that_is_gone_does_not_matter_at_the_end(tmp_path) -> None:
    """Machines remove files from it that are some days old."""
    starting = ServerProcess({"PYTHONHOME": "/nowhere"})
    starting.process.wait()
    shutil.rmtree(starting.scratch.path)
    server = EngineServer({}, {}, tmp_path / "engine_0.log", startup_timeout_seconds=30.0, starting=starting)
    server.start()
    server.stop()


def test_what_a_killed_process_left_is_removed_at_the_next_start_and_nothing_else(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    noted = Path(f"/dev/shm/sglang_loads_{uuid.uuid4().hex}.shm")
    noted.touch()
    program = f"""
import os, signal
from pathlib import Path
from megatron_dsrl.rollout.engines.server_process import ServerProcess, note_files
server = ServerProcess({{"PYTHONHOME": "/nowhere"}})
note_files([Path("{noted}"), Path("{tmp_path}/mine")], server.scratch.path)
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(tmp_path)}, timeout=60, check=False
    )
    (left,) = tmp_path.iterdir()
    (tmp_path / "mine").touch()
    running = ServerProcess({"PYTHONHOME": "/nowhere"})
    for folder in (left, running.scratch.path):
        then = time.time() - 2 * NEW_SECONDS
        os.utime(folder, (then, then))

    next_one = ServerProcess({"PYTHONHOME": "/nowhere"})
    assert set(tmp_path.iterdir()) == {tmp_path / "mine", running.scratch.path, next_one.scratch.path}
    assert not noted.exists()
    for server in (running, next_one):
        server.end()
