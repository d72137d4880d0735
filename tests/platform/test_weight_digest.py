"""The digests of weights are SGLang's own: those of its CPU function, and those of its CUDA kernel."""

import json
import subprocess
import sys

import pytest
import torch

from megatron_dsrl.platform import weight_digest

SIZES = [0, 1, 3, 4, 7, 32768, 32769, 100001]
"""Bytes: no full word, no full tile of 32 KiB, one, one and a bit, several."""

SGLANG_KERNEL = """
import importlib.util, json, sys
from pathlib import Path
import torch

class OnCuda(torch.Tensor):
    is_cuda = True  # the kernel runs in Triton's interpreter, but SGLang's function asks

folder = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])  # without importing SGLang
spec = importlib.util.spec_from_file_location("kernel", folder / "kernels/ops/memory/gpu_tensor_hash.py")
kernel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
generator = torch.Generator().manual_seed(0)
for size in json.loads(sys.argv[1]):
    tensor = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    print(kernel.gpu_tensor_hash(tensor.as_subclass(OnCuda)))
"""


@pytest.fixture(scope="module")
def kernels_digests() -> list[int]:
    program = subprocess.run(
        [sys.executable, "-c", SGLANG_KERNEL, json.dumps(SIZES)],
        env={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [int(line) for line in program.stdout.split()]


@pytest.mark.parametrize("tiles_at_a_time", [512, 1])
def test_the_word_digest_is_that_of_sglangs_kernel(tiles_at_a_time, kernels_digests, monkeypatch) -> None:
    monkeypatch.setattr(weight_digest, "TILES_AT_A_TIME", tiles_at_a_time)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in SIZES]

    assert [weight_digest.word_digest(tensor) for tensor in tensors] == kernels_digests


def test_a_tensor_may_lie_anywhere_in_a_bucket() -> None:
    tensor = torch.randint(0, 256, (1000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    bucket = torch.cat([torch.zeros(3, dtype=torch.uint8), tensor])

    assert weight_digest.word_digest(bucket[3:]) == weight_digest.word_digest(tensor)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_digest_is_the_word_digest() -> None:
    tensor = torch.randn(1000, 33, dtype=torch.bfloat16)

    expected = weight_digest.word_digest(tensor.view(torch.uint8).flatten())
    assert weight_digest.weight_digest(tensor.cuda()) == f"{expected:016x}"
