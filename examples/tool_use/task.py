"""Products of two-digit numbers, which a tiny model cannot compute, and documents that answer them."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["corpus", "train", "held_out"]


@dataclass(frozen=True)
class Product:
    """A product of two numbers from 11 to 99."""

    left: int
    right: int

    @property
    def text(self) -> str:
        """The user's question, such as `37*48=?`."""
        return f"{self.left}*{self.right}=?"

    @property
    def answer(self) -> str:
        """The gold answer."""
        return str(self.left * self.right)


def split_of(product: Product) -> Split:
    """Which split a problem belongs to: a function of its text alone, so that no problem can be in two."""
    bucket = hashlib.sha256(product.text.encode()).digest()[0]  # 0..255
    if bucket < 32:
        return "held_out"
    return "train" if bucket < 128 else "corpus"


def draw_products(split: Split, rng: random.Random) -> Iterator[Product]:
    """An endless stream of problems of one split; they may repeat."""
    while True:
        product = Product(rng.randint(11, 99), rng.randint(11, 99))
        if split_of(product) == split:
            yield product


def different_products(split: Split, count: int, rng: random.Random) -> list[Product]:
    """`count` different problems of one split."""
    chosen: dict[Product, None] = {}
    for product in draw_products(split, rng):
        chosen[product] = None
        if len(chosen) == count:
            break
    return list(chosen)


def write_document(product: Product, with_call: bool) -> str:
    """An answer, with or without a call of the calculator before it."""
    call = f"<tool>{product.left}*{product.right}</tool><result>{product.answer}</result>" if with_call else ""
    return f"{call}\\boxed{{{product.answer}}}"
