"""Calling a function of a process that is not trusted: plain data goes over, and nothing else. Standard library only.

Loaded by the sandbox's own process. Both ends speak lines of JSON: arguments one way, a value or an exception back.
What comes back is built anew here, of Python's own types, so that no object of the other side takes part in a
comparison. Numbers, strings, bytes, None, lists, tuples, sets, dicts and iterators of these can be sent; arguments are
copies, which a function may change without any effect here.
"""

import builtins
import json
import os
from collections.abc import Callable, Iterator
from io import BufferedIOBase

LONGEST_MESSAGE = 500


class ProgramError(Exception):
    """What the other side raised or how it ended, as `type: message`."""


def pack(value: object) -> object:
    """Plain data as JSON.

    Raises:
        TypeError: it is something else.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(each)] for key, each in value.items()]}
    for kind in (list, tuple, set, frozenset, Iterator):
        if isinstance(value, kind):
            return {kind.__name__: [pack(each) for each in value]}
    raise TypeError(f"only plain data can be given or returned, and this is a {type(value).__name__}")


def unpack(value: object) -> object:
    """What `pack` has packed; raises if it did not."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind == "dict":
        return {unpack(key): unpack(each) for key, each in content}
    constructors = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "Iterator": iter}
    return constructors[kind]([unpack(each) for each in content])


def serve(load: Callable[[], Callable[..., object] | None], requests: BufferedIOBase, answers: BufferedIOBase) -> None:
    """Load a program and answer calls of its function until there are no more; on the side that is not trusted."""
    try:
        function = load()
    except BaseException as error:  # SystemExit too: a program that leaves before its tests have run has not passed
        _send(answers, {"error": _described(error)})
        return
    _send(answers, {"value": None})
    for line in requests:
        try:
            arguments, named = json.loads(line)
            result = function(*map(unpack, arguments), **{name: unpack(value) for name, value in named.items()})
            answer = {"value": pack(result)}
        except BaseException as error:
            answer = {"error": _described(error)}
        _send(answers, answer)


class Caller:
    """The other side's function, on the side that judges it."""

    def __init__(self, process: int, requests: BufferedIOBase, answers: BufferedIOBase):
        """`process` is the number of the other side's, a child of this one."""
        self._process, self._requests, self._answers = process, requests, answers

    def wait_until_loaded(self) -> None:
        """Raise what loading the program has raised."""
        self._receive()

    def __call__(self, *arguments: object, **named: object) -> object:
        call = [[pack(each) for each in arguments], {name: pack(value) for name, value in named.items()}]
        try:
            _send(self._requests, call)
        except BrokenPipeError:
            pass  # how it ended is in its status
        return self._receive()

    def _receive(self) -> object:
        line = self._answers.readline()
        if not line:
            status = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
            raise ProgramError(f"ended with status {status}")
        answer = json.loads(line)
        if "error" not in answer:
            return unpack(answer["value"])
        name, message = answer["error"]
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
            raise kind(message)  # tests may expect one
        raise ProgramError(f"{name}: {message}")


def _described(error: BaseException) -> tuple[str, str]:
    return type(error).__name__, str(error)[:LONGEST_MESSAGE]


def _send(stream: BufferedIOBase, message: object) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()
