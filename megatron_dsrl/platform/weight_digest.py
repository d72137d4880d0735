"""Compute the digest of a tensor that SGLang's `/weights_checker` returns, without SGLang.

On CPU it is a prefix of the SHA-256. On CUDA, SGLang 0.5.23 hashes 32-bit words with Murmur3's finaliser, keyed by
position, in two lanes, and sums the hashes of tiles of 8192 words; here this is done with PyTorch operations on the
tensor's device. SGLang's kernel cannot be imported: importing SGLang patches Transformers, which must not happen in the
trainer.
"""

import hashlib

import torch
from torch import Tensor

from megatron_dsrl.common.tensor_bytes import bytes_of

TILE_WORDS = 8192
TILES_AT_A_TIME = 512
"""16 MiB of words; the temporaries take a few times that."""
PLACE_FACTORS = (0x27D4EB2D, 0x165667B1)
PLACE_ROTATIONS = (15, 13)
SEED = 0x243F6A88
SEEDS = (SEED, (SEED * 0x9E3779B1 ^ 0xDEADBEEF) & 0xFFFFFFFF)


def weight_digest(tensor: Tensor) -> str:
    """16 hexadecimal digits, as SGLang computes them on the tensor's device; independent of the shape."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return f"{word_digest(flat) if tensor.is_cuda else byte_digest(flat):016x}"


def byte_digest(flat: Tensor) -> int:
    """The first 64 bits of the SHA-256 of a byte tensor on CPU."""
    return int.from_bytes(hashlib.sha256(bytes_of(flat)).digest()[:8], "big")


@torch.inference_mode()
def word_digest(flat: Tensor) -> int:
    """SGLang's 64-bit hash for byte tensors on CUDA, computed on any device."""
    if flat.numel() == 0:
        return 0
    if flat.numel() % 4 or flat.storage_offset() % 4:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 4))  # always copies, so the result is word-aligned
    words = flat.view(torch.int32)
    total = 0
    for start in range(0, len(words), TILES_AT_A_TIME * TILE_WORDS):
        part = words[start : start + TILES_AT_A_TIME * TILE_WORDS]
        high, low = (_lane(part, start, len(words), lane) for lane in (0, 1))
        total += int((high << 32).sum()) + int(low.sum())  # int64 sums wrap like SGLang's sums of 64-bit words
    return _mix_64(total)


def _lane(words: Tensor, start: int, count: int, lane: int) -> Tensor:
    """One lane's hash of each tile of `words`, which start at word `start` of `count`: [tiles] int64, 0..2^32 - 1."""
    place = torch.arange(start, start + len(words), device=words.device).to(torch.int32)  # wraps above 2^31
    keys = (place * _signed(PLACE_FACTORS[lane]) + _signed(SEEDS[lane])) ^ _rotate_left(place, PLACE_ROTATIONS[lane])
    hashes = _mix_32(words ^ keys)
    tiles = torch.nn.functional.pad(hashes, (0, -len(words) % TILE_WORDS)).view(-1, TILE_WORDS)
    sums = tiles.to(torch.int64).sum(dim=1).to(torch.int32)
    return _mix_32(sums ^ _signed(count * 4 & 0xFFFFFFFF)).to(torch.int64) & 0xFFFFFFFF


def _mix_32(x: Tensor) -> Tensor:
    """Murmur3's 32-bit finaliser on int32 tensors that represent unsigned words: products wrap, shifts are logical."""
    x = x ^ _shift_right(x, 16)
    x = x * _signed(0x85EBCA6B)
    x = x ^ _shift_right(x, 13)
    x = x * _signed(0xC2B2AE35)
    return x ^ _shift_right(x, 16)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _rotate_left(x: Tensor, bits: int) -> Tensor:
    return (x << bits) | _shift_right(x, 32 - bits)


def _signed(word: int) -> int:
    """The int32 with the bits of an unsigned word."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _mix_64(x: int) -> int:
    """SplitMix64's finaliser."""
    mask = (1 << 64) - 1
    x &= mask
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
    return x ^ x >> 31
