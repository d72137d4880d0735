"""Checkpoint folders: whole or absent, validated, pruned; the last good one survives every failure.

The actor's part is made of a few files here; `tests/test_resume.py` has the real one.
"""

import ctypes
import json
import multiprocessing
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_dsrl.checkpoint.compatibility import check_same_model, check_same_optimizer, check_same_run
from megatron_dsrl.checkpoint.state import ProcessLayout, RunState
from megatron_dsrl.checkpoint.store import CheckpointStore
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.actor import ReferenceConfig
from megatron_dsrl.config.data import MixedSetConfig
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.config.run import RunConfig
from tests.support.disk import files_of_at_most
from tests.support.distributed import run_distributed, start_one_process
from tests.support.engine import tiny_run_config
from tests.support.waiting import wait_until

LAYOUT = ProcessLayout(world_size=1, tensor_parallel_size=1, pipeline_parallel_size=1, distributed_optimizer=False)


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("rendezvous") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Store(CheckpointStore):
    """A store that remembers what it reported."""

    def __init__(
        self, root: Path, keep_last: int = 2, keep_every_steps: int | None = None, asynchronous: bool = False
    ) -> None:
        self.reports: list[str] = []
        super().__init__(root, keep_last, keep_every_steps, self.reports.append, asynchronous)


def state(step: int) -> RunState:
    return RunState(step, "GRPO", {"epoch": 0, "position": 8 * step}, LAYOUT, {"layers": 4}, {"seed": 1, "rate": 1e-3})


class FewFiles:
    """The actor's part of a checkpoint."""

    def __init__(self, folder: Path, copy: bool) -> None:
        self._folder = folder

    def write(self) -> list[Path]:
        shard = self._folder / "__0_0.distcp"
        shard.write_bytes(bytes(range(256)) * 40)
        return [shard]

    def finish(self) -> None:
        torch.save({"weight": torch.arange(1000)}, io := BytesIO())
        (self._folder / "common.pt").write_bytes(io.getvalue())


class OneLargeFile(FewFiles):
    """A file that is read in many pieces."""

    def write(self) -> list[Path]:
        shard = self._folder / "__0_0.distcp"
        with open(shard, "wb") as stream:
            stream.truncate(40 * 2**20)
        return [shard]


def growth_by_a_large_file(root: Path) -> int:
    """Bytes that a process keeps after an asynchronous save of a large file."""
    dist.init_process_group("gloo")
    store, used = Store(root, asynchronous=True), []
    for step, part in enumerate((FewFiles, OneLargeFile), start=1):
        store.save(state(step), part)
        store.finish()
        used.append(psutil.Process().memory_full_info().uss)
    dist.destroy_process_group()
    return used[1] - used[0]


def test_a_save_leaves_no_memory_behind(tmp_path) -> None:
    """Each asynchronous save has its own thread, and the memory of a thread's heap stays with the process."""
    (growth,) = run_distributed(growth_by_a_large_file, 1, tmp_path)
    assert growth < 8 * 2**20


def saved(root: Path, *steps: int, **options) -> Store:
    store = Store(root, **options)
    for step in steps:
        store.save(state(step), FewFiles)
    return store


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_the_newest_checkpoint_comes_back_as_it_was_saved(tmp_path) -> None:
    assert Store(tmp_path / "absent").newest() is None
    saved(tmp_path, 1, 2)
    newest = Store(tmp_path).newest()
    assert newest.state == state(2)
    assert newest.weights_folder == tmp_path / "step_000002" / "megatron"
    assert torch.equal(torch.load(newest.weights_folder / "common.pt")["weight"], torch.arange(1000))


def test_other_models_are_saved_beside_the_actor_and_validated_with_it(tmp_path) -> None:
    store = saved(tmp_path, 1)
    store.save(state(2), FewFiles, {"critic": FewFiles})
    damaged = tmp_path / "step_000002" / "critic" / "__0_0.distcp"
    assert store.newest().folder == damaged.parents[1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert store.newest().state.step == 1
    assert "critic/__0_0.distcp" in store.reports[0]


@pytest.mark.parametrize(
    ("keep_last", "keep_every_steps", "kept"),
    [(1, None, [6]), (3, None, [4, 5, 6]), (1, 2, [2, 4, 6]), (2, 4, [4, 5, 6])],
)
def test_old_checkpoints_are_removed(tmp_path, keep_last, keep_every_steps, kept) -> None:
    saved(tmp_path, *range(1, 7), keep_last=keep_last, keep_every_steps=keep_every_steps)
    assert names(tmp_path) == [f"step_{step:06d}" for step in kept]


def flip_a_byte(checkpoint: Path) -> None:
    file = checkpoint / "megatron" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)


def flip_a_digit_of_the_state(checkpoint: Path) -> None:
    file = checkpoint / "state.json"
    file.write_text(file.read_text().replace('"position": 24', '"position": 25'))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped byte": (flip_a_byte, "megatron/__0_0.distcp has changed"),
    "truncated file": (lambda c: os.truncate(c / "megatron" / "common.pt", 100), "megatron/common.pt has changed"),
    "missing file": (lambda c: (c / "megatron" / "common.pt").unlink(), "megatron/common.pt: No such file"),
    "missing folder": (lambda c: shutil.rmtree(c / "megatron"), "No such file"),
    "no state": (lambda c: (c / "state.json").unlink(), "state.json: .*No such file"),
    "broken state": (lambda c: os.truncate(c / "state.json", 200), "state.json: "),
    "another document": (lambda c: (c / "state.json").write_text("[1, 2]"), "state.json: not a checkpoint's state"),
    "no text": (lambda c: (c / "state.json").write_bytes(b"\xff\xfe\x00"), "state.json: "),
    "flipped digit": (flip_a_digit_of_the_state, "state.json: the checksum does not match the content"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage) -> None:
    saved(tmp_path, 1, 2, 3, keep_last=3)
    spoil, problem = DAMAGES[damage]
    spoil(tmp_path / "step_000003")

    store = Store(tmp_path)
    assert store.newest().state.step == 2
    (report,) = store.reports
    assert str(tmp_path / "step_000003") in report
    assert re.search(problem, report), report

    store.save(state(3), FewFiles)  # the step is taken again
    assert Store(tmp_path).newest().state.step == 3


def test_a_run_whose_checkpoints_are_all_damaged_does_not_silently_start_again(tmp_path) -> None:
    assert Store(tmp_path).newest() is None
    saved(tmp_path, 1, 2)
    for folder in tmp_path.iterdir():
        flip_a_byte(folder)
    store = Store(tmp_path)
    with pytest.raises(UserError, match="all checkpoints in .* are damaged"):
        store.newest()
    assert len(store.reports) == 2


def test_a_new_checkpoint_outlives_damaged_later_ones(tmp_path) -> None:
    saved(tmp_path, 1, 8, 9, keep_last=3)
    for step in (8, 9):
        flip_a_byte(tmp_path / f"step_{step:06d}")
    store = Store(tmp_path, keep_last=1)
    assert store.newest().state.step == 1
    store.save(state(2), FewFiles)
    assert Store(tmp_path).newest().state.step == 2


def save_and_never_end(root: Path) -> None:
    """Step 1, then step 2 in the background, which stands still in the middle of a file."""

    class Half(FewFiles):
        def write(self) -> list[Path]:
            (self._folder / "__0_0.distcp").write_bytes(b"half")
            time.sleep(600)
            raise AssertionError

    dist.init_process_group("gloo")
    store = Store(root, asynchronous=True)
    store.save(state(1), FewFiles)
    store.save(state(2), Half)
    time.sleep(600)


def test_kill_9_during_a_save_in_the_background_leaves_the_checkpoint_before_it(tmp_path) -> None:
    process = start_one_process(save_and_never_end, tmp_path)
    try:
        wait_until((tmp_path / ".partial_step_000002" / "megatron" / "__0_0.distcp").exists, 60)
    finally:
        process.kill()
        process.wait()
    assert names(tmp_path) == [".partial_step_000002", "step_000001"]
    resumed = Store(tmp_path)
    assert resumed.newest().state == state(1) and resumed.reports == []
    resumed.save(state(3), FewFiles)
    assert names(tmp_path) == ["step_000001", "step_000003"]


class Held(FewFiles):
    """Is written only when it is let go."""

    go: threading.Event

    def write(self) -> list[Path]:
        assert self.go.wait(60)
        return super().write()


@pytest.fixture
def held() -> type[Held]:
    class HeldHere(Held):
        go = threading.Event()

    return HeldHere


def poll_until(store: Store, what: Callable[[], bool]) -> None:
    wait_until(lambda: store.poll() or what(), 60, pause_seconds=0.001)


def test_a_save_in_the_background_is_published_when_it_is_complete(tmp_path, held) -> None:
    store = saved(tmp_path, 1, asynchronous=True)
    store.finish()
    store.save(state(2), held)
    store.poll()
    assert names(tmp_path) == [".partial_step_000002", "step_000001"]
    held.go.set()
    poll_until(store, lambda: (tmp_path / "step_000002").exists())
    assert Store(tmp_path).newest().state == state(2) and names(tmp_path) == ["step_000001", "step_000002"]


def test_the_next_save_waits_for_the_one_in_flight(tmp_path, held) -> None:
    store = Store(tmp_path, asynchronous=True)
    store.save(state(1), held)
    threading.Timer(0.2, held.go.set).start()
    store.save(state(2), FewFiles)
    assert "step_000001" in names(tmp_path)
    store.finish()
    assert names(tmp_path) == ["step_000001", "step_000002"]
    store.save(state(2), must_not_be_called)  # as a request to stop does, before the next step


def test_a_failure_in_the_background_surfaces_at_the_next_boundary(tmp_path) -> None:
    store = saved(tmp_path, 1, asynchronous=True)
    store.finish()
    with files_of_at_most(2000):
        store.save(state(2), FewFiles)
        with pytest.raises(UserError, match="step 2 could not be written .* MiB are free.*File too large"):
            poll_until(store, lambda: False)
    assert names(tmp_path) == ["step_000001"]
    store.save(state(3), FewFiles)
    store.finish()
    assert Store(tmp_path).newest().state.step == 3


def test_a_defect_in_the_background_keeps_its_traceback(tmp_path) -> None:
    class Defect(FewFiles):
        def write(self) -> list[Path]:
            raise ZeroDivisionError("a defect")

    store = Store(tmp_path, asynchronous=True)
    store.save(state(1), Defect)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        store.finish()


def must_not_be_called(folder: Path, copy: bool) -> FewFiles:
    raise AssertionError


def test_the_checkpoint_that_a_run_continues_from_is_not_written_again(tmp_path) -> None:
    saved(tmp_path, 1)
    store = Store(tmp_path)
    store.newest()

    store.save(state(1), must_not_be_called)


@pytest.mark.parametrize("size", [200, 2000, 10_000], ids=["all files", "torch.save", "shard"])
def test_a_disk_that_fills_up(tmp_path, size) -> None:
    store = saved(tmp_path, 1)
    with files_of_at_most(size), pytest.raises(UserError, match="step 2 could not be written .* MiB are free"):
        store.save(state(2), FewFiles)
    assert names(tmp_path) == ["step_000001"]
    assert Store(tmp_path).newest().state.step == 1
    store.save(state(2), FewFiles)
    assert Store(tmp_path).newest().state.step == 2


def test_a_place_that_cannot_be_written_to(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="step 1 could not be written to .*Not a directory"):
        saved(tmp_path / "file", 1)


@contextmanager
def without_roots_privileges() -> Iterator[None]:
    """Permissions stop root as well, while its thread has put its capabilities aside (capset of Linux)."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    before = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then the same of the upper 32 capabilities
    assert libc.capget(header, before) == 0
    without = (ctypes.c_uint32 * 6)(*before)
    without[0] = without[3] = 0
    assert libc.capset(header, without) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


def test_a_read_only_folder(tmp_path) -> None:
    saved(tmp_path, 1)
    tmp_path.chmod(0o500)
    try:
        with without_roots_privileges(), pytest.raises(UserError, match="step 2 could not .*Permission denied"):
            saved(tmp_path, 2)
    finally:
        tmp_path.chmod(0o700)
    assert names(tmp_path) == ["step_000001"]
    saved(tmp_path, 2)


def save_an_actor_onto_a_full_disk(model: Path, root: Path, full_on: list[int], asynchronous: bool) -> list[list]:
    """Save with room, then without on some ranks, where asynchronous also without only at the end. The messages of the
    failures, and the newest checkpoint after each."""
    from megatron_dsrl.actor.build import build_actor
    from megatron_dsrl.model.parallel import destroy_parallel, initialize_parallel
    from tests.actor.test_saved_state import ACTOR, run_config

    parallel = ParallelConfig(tensor_parallel_size=dist.get_world_size() if dist.is_initialized() else 2)
    initialize_parallel(parallel, 1)
    actor = build_actor(run_config(model, parallel, ACTOR), model)
    store = Store(root, asynchronous=asynchronous)
    store.save(state(1), actor.model.start_save)
    store.finish()
    assert multiprocessing.active_children() == []  # nothing that could outlive a killed trainer
    room = 20_000 if dist.get_rank() in full_on else 10**9
    failures = []
    with files_of_at_most(room), pytest.raises(UserError) as failure:
        store.save(state(2), actor.model.start_save)
        store.finish()
    failures.append([str(failure.value), store.newest().state.step])
    if asynchronous:
        store.save(state(2), actor.model.start_save)
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()
        with files_of_at_most(room // 100), pytest.raises(UserError) as failure:
            store.finish()
        failures.append([str(failure.value), store.newest().state.step])
    destroy_parallel()
    return failures


@pytest.mark.parametrize(
    ("full_on", "asynchronous"),
    [([0], True), pytest.param([1], False, marks=pytest.mark.slow)],
    ids=["rank 0", "rank 1"],
)
def test_megatron_on_a_full_disk_of_one_rank_ends_all_ranks(tiny_model_folder, tmp_path, full_on, asynchronous) -> None:
    results = run_distributed(save_an_actor_onto_a_full_disk, 2, tiny_model_folder, tmp_path, full_on, asynchronous)
    for failures in results:
        assert len(failures) == 1 + asynchronous
        for message, found in failures:
            assert "the checkpoint of step 2 could not be written" in message and "File too large" in message
            assert found == 1
    assert names(tmp_path) == ["step_000001"]


def test_a_checkpoint_of_a_different_model_is_refused() -> None:
    before = {"layers": 4, "rope": {"base": 10_000}}
    check_same_model(before, before, "there")
    with pytest.raises(UserError, match="layers is 4 there and 5 here; rope.base is 10000 there and 1000000 here"):
        check_same_model(before, {"layers": 5, "rope": {"base": 1_000_000}}, "there")


def test_the_other_kind_of_optimizer_is_refused() -> None:
    with pytest.raises(UserError, match="written with parallel.distributed_optimizer=false"):
        check_same_optimizer(LAYOUT, ParallelConfig(distributed_optimizer=True), "there")
    with pytest.raises(UserError, match="expert_parallel_size=1; continue with 1"):
        check_same_optimizer(LAYOUT, ParallelConfig(expert_parallel_size=2), "there")


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("actor", {"kept_logits_megabytes": 0, "cpu_threads": 2}),
        ("reward", {"memory_megabytes": 512, "max_consecutive_errors": None}),
        ("rollout", {"request_timeout_seconds": 60.0, "request_attempts": 9}),
    ],
)
def test_limits_and_memory_may_change_when_a_run_is_continued(section, changes, tmp_path) -> None:
    config = tiny_run_config(tmp_path)
    changed = config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})
    assert changed != config
    check_same_run(config.model_dump(mode="json"), changed, "there")


def test_a_different_configuration_is_refused_but_not_a_different_layout(tmp_path) -> None:
    config = tiny_run_config(tmp_path)
    before = json.loads(json.dumps(config.model_dump(mode="json")))
    check_same_run(before, config.model_copy(update={"parallel": ParallelConfig(tensor_parallel_size=2)}), "there")
    del before["rollout"]["deterministic"]  # as if the program had not had the field yet
    check_same_run(before, config, "there")
    changed = config.model_copy(update={"seed": 5, "data": config.data.model_copy(update={"limit": 3})})
    with pytest.raises(UserError, match=r"(?s)there holds .* data.limit: None there, 3 now\n  seed: 1 there, 5 now"):
        check_same_run(before, changed, "there")


def test_a_server_may_have_moved_and_every_set_of_a_mixture_may_be_given_more_time(tmp_path) -> None:
    def run(url: str | None, seconds: float, function: str = "boxed") -> RunConfig:
        config = tiny_run_config(tmp_path)
        further = {
            "name": "further",
            "source": "more.jsonl",
            "reward": {"function": function, "timeout_seconds": seconds},
        }
        data = config.data.model_copy(update={"mixed_with": [MixedSetConfig(**further)]})
        return config.model_copy(update={"data": data, "reference": ReferenceConfig(url=url)})

    before = run("http://one:30000", 1.0).model_dump(mode="json")
    check_same_run(before, run("http://other:30000", 4.0), "there")
    with pytest.raises(UserError, match="reference.url"):
        check_same_run(before, run(None, 1.0), "there")
    with pytest.raises(UserError, match="data.mixed_with.0.reward.function"):
        check_same_run(before, run("http://one:30000", 1.0, function="multiple_choice"), "there")
