"""Prints what W&B has written offline in a run folder as JSON: python -m tests.support.read_wandb RUN.

Runs in the environment of tracker_packages.py. W&B's package no longer reads its own files; SwanLab's does.
"""

import json
import sys
from pathlib import Path
from typing import Any

from swanlab.converter.wb.wbdatastore import WBDataStoreReader
from wandb.proto.wandb_internal_pb2 import Record


def read(run_folder: Path) -> dict[str, Any]:
    """Ids of the runs, the first one's configuration, and the history rows of all parts in the order of their time."""
    ids, config, history = [], {}, []
    for file in sorted(run_folder.glob("wandb/offline-run-*/run-*.wandb")):
        with WBDataStoreReader() as reader:
            reader.open(file)
            while (data := reader.scan()) is not None:
                record = Record.FromString(data)
                if record.HasField("run"):
                    ids.append(record.run.run_id)
                    config = config or {item.key: json.loads(item.value_json) for item in record.run.config.update}
                elif record.HasField("history"):
                    items = record.history.item
                    row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                    history.append({"step": record.history.step.num, **row})
    return {"ids": ids, "config": config, "history": history}


if __name__ == "__main__":
    print(json.dumps(read(Path(sys.argv[1]))))
