"""The other process of the weight stream, in the place of an engine: opens buckets, and copies them into its weights.

It reads one JSON object per line from stdin and answers each with one on stdout: a bucket with the bytes that it
copied, `digests` with the digest of every weight.
"""

import json
import os
import sys
from typing import Any

import torch

from megatron_dsrl.platform import current_platform
from megatron_dsrl.platform.weight_digest import weight_digest
from tools.gpu_probe.bucket_code import choose_bucket_code
from tools.gpu_probe.clock import synchronize


def main() -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to stderr
    code, held = choose_bucket_code(), {}
    answers.write(json.dumps({"code": code.description, "platform": current_platform().name}) + "\n")
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        if "digests" in request:
            answer: dict[str, Any] = {"digests": {name: weight_digest(tensor) for name, tensor in held.items()}}
        else:
            opened = code.open(request["bucket"])
            answer = {"bytes": copy_into(held, code.tensors(opened["flattened_tensor"], opened["metadata"]))}
            del opened  # releases the sender's memory
        answers.write(json.dumps(answer) + "\n")


def copy_into(held: dict[str, torch.Tensor], tensors: list[tuple[str, torch.Tensor]]) -> int:
    """Copy tensors into those of the same name, which are created at first; returns the bytes."""
    for name, tensor in tensors:
        if name not in held:
            held[name] = torch.empty_like(tensor)
        held[name].copy_(tensor)
    synchronize()
    return sum(tensor.nbytes for _, tensor in tensors)


if __name__ == "__main__":
    main()
