"""A compact form of `/generate`'s answers: 8 bytes per token, where SGLang's JSON takes about 40.

SGLang writes each token's id twice, and its log-prob as text. Reading that costs rank 0 several times as much as
anything else that it does with a token, and rank 0 reads the answers of all engines. So the engines that a run starts
pack their answers if the Accept header asks for it; other servers ignore the header and answer in JSON.

Layout: the length of the head (8 bytes, little-endian); the head, a JSON list with one object per answer: SGLang's
`meta_info` without log-probs, and the number of tokens; the token ids of all answers as int32; their log-probs as
float32, NaN for a missing one.
"""

import gc
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from megatron_dsrl.common.compact import float_array, int_array

MEDIA_TYPE = "application/x-packed-samples"
KEPT = ("finish_reason", "weight_versions", "routed_experts")
"""What the head keeps of `meta_info`."""
_LENGTH_BYTES = 8
_NUMBER_BYTES = 4


@dataclass(frozen=True)
class Answer:
    """One response as the engine returned it, unchecked."""

    response_ids: "array[int]"
    log_probs: "array[float]"
    """NaN if the engine has none."""
    meta: dict[str, Any]
    """The entries `KEPT` of SGLang's `meta_info`."""


def pack(answers: Sequence[dict[str, Any]]) -> bytes:
    """The packed form of SGLang's answers, the decoded JSON of `/generate`."""
    all_ids = [np.array(answer["output_ids"], dtype=np.int32) for answer in answers]
    all_log_probs = [np.array(_log_probs(answer), dtype=np.float32) for answer in answers]
    head = orjson.dumps([_kept(answer["meta_info"]) | {"tokens": len(ids)} for answer, ids in zip(answers, all_ids)])
    parts = [len(head).to_bytes(_LENGTH_BYTES, "little"), head]
    return b"".join([*parts, *(ids.tobytes() for ids in all_ids), *(each.tobytes() for each in all_log_probs)])


def unpack(content: bytes) -> list[Answer]:
    """The answers in `pack`'s form. Raises ValueError if the content is not complete."""
    start = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    heads = orjson.loads(content[_LENGTH_BYTES:start])
    counts = [head.pop("tokens") for head in heads]
    if len(content) != start + 2 * _NUMBER_BYTES * sum(counts):
        raise ValueError(f"{len(content)} bytes for {sum(counts)} tokens")
    numbers = memoryview(content)[start:]
    answers, first, total = [], 0, sum(counts)
    for head, count in zip(heads, counts):
        ids, log_probs = array("i"), array("f")
        ids.frombytes(numbers[_NUMBER_BYTES * first : _NUMBER_BYTES * (first + count)])
        log_probs.frombytes(numbers[_NUMBER_BYTES * (total + first) : _NUMBER_BYTES * (total + first + count)])
        answers.append(Answer(ids, log_probs, head))
        first += count
    return answers


def read_json(content: bytes) -> list[Answer]:
    """The answers of a server that does not pack them.

    Raises:
        ValueError: the content is not JSON, or an entry is missing or has another type.
    """
    # JSON has a list per token; collecting garbage meanwhile visits all of them again and again, which takes most of
    # the time. None are left when the collector is switched on again.
    collects = gc.isenabled()
    gc.disable()
    try:
        return [
            Answer(int_array(answer["output_ids"]), float_array(_log_probs(answer)), _kept(answer["meta_info"]))
            for answer in orjson.loads(content)
        ]
    except (TypeError, KeyError) as error:
        raise ValueError(repr(error)) from error
    finally:
        if collects:
            gc.enable()


def _kept(meta: dict[str, Any]) -> dict[str, Any]:
    return {name: meta[name] for name in KEPT if name in meta}


def _log_probs(answer: dict[str, Any]) -> list[float]:
    """The log-probs; JSON has no NaN, so SGLang writes null. Absent if the response never began."""
    found = [entry[0] for entry in answer["meta_info"].get("output_token_logprobs", ())]
    return [float("nan") if each is None else each for each in found] if None in found else found


def register_route() -> None:
    """Have SGLang's HTTP server answer `/generate` in this form if a request's Accept header asks for it. Run in its
    process before it serves."""
    from fastapi import Request, Response
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers.io_struct import GenerateReqInput

    async def generate(obj: GenerateReqInput, request: Request) -> Response:
        if request.headers.get("accept") != MEDIA_TYPE:
            return await http_server.generate_request(obj, request)
        try:
            manager = http_server.get_global_state().tokenizer_manager
            answers = await anext(manager.generate_request(obj, request))
        except ValueError as error:
            return Response(str(error), status_code=getattr(error, "status_code", 400))
        return Response(pack(answers), media_type=MEDIA_TYPE)

    routes = http_server.app.router.routes
    http_server.app.post("/generate", response_model=None)(generate)
    routes.insert(0, routes.pop())  # the first route of a path is the one that is used
