"""A reward for models with random weights, which never solve a problem."""

import zlib


def checksum_parity(response: str, answer: str) -> float:
    """0 or 1 by the response's text, so that the responses to one prompt differ."""
    return float(zlib.crc32(response.encode()) % 2)
