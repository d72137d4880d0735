"""Launched processes meet, whichever comes first."""

import sys
from datetime import timedelta

import pytest

from megatron_dsrl.common.collective import join_processes
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.held_port import HeldPort
from megatron_dsrl.run.launch import launch

MEETS = """
import os, pathlib, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from megatron_dsrl.common.collective import join_processes
folder, first = pathlib.Path(sys.argv[1]), sys.argv[2]
begins = pathlib.Path(folder, "first-begins")
if os.environ["RANK"] == first:
    begins.touch()
else:
    while not begins.exists():
        time.sleep(0.01)
    time.sleep(0.3)
join_processes("gloo", timedelta(minutes=1))
total = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(total)
pathlib.Path(folder, os.environ["RANK"]).write_text(str(total.item()))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("first", ["0", "1"])
def test_ranks_meet_whichever_comes_first(first, tmp_path, capfd) -> None:
    assert launch([sys.executable, "-c", MEETS, str(tmp_path), first], 2) == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["3", "3"]
    assert "retrying" not in capfd.readouterr().err  # torch's client, before it sleeps


def test_a_rank_that_cannot_reach_the_first_one_says_so(monkeypatch) -> None:
    port = HeldPort("127.0.0.1", None)  # bound, but nothing listens
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port.number))
    with pytest.raises(UserError, match=f"rank 3 cannot reach rank 0 at 127.0.0.1:{port.number}.*refused"):
        join_processes("gloo", timedelta(minutes=1), first_rank_limit=timedelta(seconds=0.1))
    port.close()


def test_a_rank_without_an_address_says_so(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(UserError, match="RANK is set, but not MASTER_ADDR"):
        join_processes("gloo", timedelta(minutes=1))
