"""Calling a function of an untrusted process, exchanging nothing but plain data. Standard library only.

Loaded by the sandbox's own processes. Both ends exchange lines of JSON: arguments one way, a value or an exception
back. Values are rebuilt here from Python's own types, so that no object of the other side takes part in a comparison.
Numbers, strings, bytes, None, lists, tuples, sets, dicts and iterators of these can be sent. Arguments are copies: if
the function changes them, nothing changes here.
"""

import builtins
import json
import os
from collections.abc import Callable, Iterator
from io import BufferedIOBase

LONGEST_MESSAGE = 500
NOT_RAISED_AGAIN = (UnicodeError, StopIteration, StopAsyncIteration)
"""Exceptions of the program that the tests get as ProgramError: the first takes more than a message, the others would
silently end an iteration such as `all(map(function, cases))`."""

CONSTRUCTORS: dict[str, Callable[[list[object]], object]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "Iterator": iter,
}
"""Containers that can be sent, by the name under which `pack` sends them."""


class ProgramError(Exception):
    """The other side's exception as `type: message`, or how its process ended."""


def pack(value: object) -> object:
    """Convert plain data to JSON values; raises TypeError for anything else."""
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
    for container in (list, tuple, set, frozenset, Iterator):
        if isinstance(value, container):
            return {container.__name__: [pack(each) for each in value]}
    raise TypeError(f"only plain data can be passed or returned, not a {type(value).__name__}")


def unpack(value: object) -> object:
    """The inverse of `pack`; raises for anything that `pack` did not produce."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind == "dict":
        return {unpack(key): unpack(each) for key, each in content}
    return CONSTRUCTORS[kind]([unpack(each) for each in content])


def serve(load: Callable[[], Callable[..., object] | None], requests: BufferedIOBase, answers: BufferedIOBase) -> None:
    """On the untrusted side: load a program and answer calls of its function until the caller closes the connection."""
    try:
        function = load()
    except BaseException as error:  # SystemExit too: a program that exits before its tests have not passed
        _send(answers, {"error": _described(error)})
        return
    _send(answers, {"value": None})
    for line in requests:
        try:
            if function is None:
                raise NameError("the program does not define the function that its tests call")
            arguments, named = json.loads(line)
            result = function(*map(unpack, arguments), **{name: unpack(value) for name, value in named.items()})
            answer = {"value": pack(result)}
        except BaseException as error:
            answer = {"error": _described(error)}
        _send(answers, answer)


class Caller:
    """The untrusted side's function, as the tests call it."""

    def __init__(self, process: int, requests: BufferedIOBase, answers: BufferedIOBase) -> None:
        """`process` is the process id of the untrusted side, a child of this process."""
        self._process, self._requests, self._answers = process, requests, answers

    def wait_until_loaded(self) -> None:
        """Wait until the program is loaded; raises the exception that loading raised."""
        self._receive()

    def __call__(self, *arguments: object, **named: object) -> object:
        call = [[pack(each) for each in arguments], {name: pack(value) for name, value in named.items()}]
        try:
            _send(self._requests, call)
        except BrokenPipeError:
            pass  # its exit status says how it ended
        return self._receive()

    def _receive(self) -> object:
        line = self._answers.readline()
        if not line:
            status = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
            raise ProgramError(f"exited with status {status}")
        answer = json.loads(line)
        if "error" not in answer:
            return unpack(answer["value"])
        name, message = answer["error"]
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, NOT_RAISED_AGAIN):
            raise kind(message)  # tests may expect one
        raise ProgramError(f"{name}: {message}")


def _described(error: BaseException) -> tuple[str, str]:
    return type(error).__name__, str(error)[:LONGEST_MESSAGE]


def _send(stream: BufferedIOBase, message: object) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()
