"""How the suites of this folder damage files and values, and what they call surviving it.

Everything is drawn from seeds, so that a failure comes back; what was found stays as a named case in its suite.
"""

from __future__ import annotations

import copy
import resource
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from saccade.errors import UserError

T, V = TypeVar("T"), TypeVar("V")
SECONDS = 30  # of processor time for one attempt: a guard against what never ends, not a measurement
STATM = "/proc/self/statm"
MEGABYTES = 1500  # of address space that one attempt may add

# Numbers at which formats count wrongly, as they stand in files.
EDGES = [
    (value & (256**width - 1)).to_bytes(width, order)
    for width in (1, 2, 4, 8)
    for value in (0, 1, -1, 2 ** (8 * width - 1), 2 ** (8 * width - 1) - 1)
    for order in ("little", "big")
]


class Endless(BaseException):
    """Took longer than any answer should: not an Exception, which a decoder may swallow."""


def attempt(act: Callable[[], T], *, seconds: float = SECONDS, megabytes: int = MEGABYTES) -> T | UserError:
    """What ``act`` gives, or the library's own error; any other exception passes, as do too much time and memory.

    The error has to be one line that is not empty.
    """
    with limits(seconds, megabytes):
        try:
            return act()
        except UserError as error:
            refused = error
    text = str(refused)
    assert text.strip() and len(text.splitlines()) == 1, f"not one line: {text[:300]!r}"
    assert len(text) < 3000, f"a line of {len(text)} characters: {text[:300]!r}"
    assert text.isprintable(), f"control characters: {text[:300]!r}"
    return refused


def outcomes(cases: Iterable[tuple[str, V]], act: Callable[[V], T]) -> list[T]:
    """What ``act`` gives for each named case. Raises AssertionError with the case's name where it raises."""
    found = []
    for name, case in cases:
        try:
            found.append(act(case))
        except Exception as error:
            raise AssertionError(name) from error
    return found


def refusals(found: Iterable[object]) -> int:
    """How many of some outcomes are the library's own error."""
    return sum(isinstance(one, UserError) for one in found)


@contextmanager
def limits(seconds: float, megabytes: int) -> Iterator[None]:
    """Bounds on processor time and on new address space of this process while the block runs."""

    def give_up(*_: object) -> None:
        raise Endless(f"more than {seconds:g} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open(STATM) as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGPROF, give_up)
    resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 2**20, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


# What a block opens. An audit hook cannot be taken away again, so there is one, which listens when asked.

_heard: list[tuple[str, str]] | None = None
_REACH = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")


def _hear(event: str, arguments: tuple) -> None:
    name = str(arguments[0]) if arguments else ""
    if _heard is not None and (event == "open" or event in _REACH) and name != STATM:
        _heard.append((event, name))


sys.addaudithook(_hear)


@contextmanager
def listening() -> Iterator[list[tuple[str, str]]]:
    """Files opened, hosts asked and processes started while the block runs: (event, name)."""
    global _heard
    _heard = heard = []
    try:
        yield heard
    finally:
        _heard = None


_PYTHON = [Path(p).resolve() for p in (*sys.path, sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()) if p]
_HARMLESS = [Path(p) for p in ("/proc", "/sys", "/dev/null")]


def reached(heard: list[tuple[str, str]], *allowed: Path) -> list[str]:
    """What was opened, asked or started beyond the interpreter's own files and ``allowed`` folders and files."""
    own = [*_PYTHON, *_HARMLESS, *(p.resolve() for p in allowed)]
    return [
        f"{event} {name}"
        for event, name in heard
        if event != "open" or not (name.isdigit() or any(Path(name).resolve().is_relative_to(p) for p in own))
    ]


# Bytes


def damaged(data: bytes, seed: int, count: int, header: int = 64) -> Iterator[tuple[str, bytes]]:
    """``count`` damaged copies of ``data``, each with a name; half of the edits lie in the first ``header`` bytes."""
    for number in range(count):
        rng = Random(f"{seed}/{number}")
        kind = rng.choice(KINDS)
        yield f"{number} {kind.__name__}", kind(bytearray(data), rng, header)


def _place(data: bytearray, rng: Random, header: int) -> int:
    return rng.randrange(min(header, len(data)) if rng.random() < 0.5 else len(data))


def truncate(data: bytearray, rng: Random, header: int) -> bytes:
    return bytes(data[: _place(data, rng, header)])


def flip(data: bytearray, rng: Random, header: int) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[_place(data, rng, header)] ^= 1 << rng.randrange(8)
    return bytes(data)


def edge(data: bytearray, rng: Random, header: int) -> bytes:
    """A number that is at the edge of its type."""
    at, value = _place(data, rng, header), rng.choice(EDGES)
    data[at : at + len(value)] = value
    return bytes(data)


def splice(data: bytearray, rng: Random, header: int) -> bytes:
    """A part stands somewhere else too."""
    start, at = rng.randrange(len(data)), _place(data, rng, header)
    part = data[start : start + rng.choice((1, 4, 16, 256, 4096))]
    data[at : at + (len(part) if rng.random() < 0.5 else 0)] = part
    return bytes(data)


def cut(data: bytearray, rng: Random, header: int) -> bytes:
    at = _place(data, rng, header)
    del data[at : at + rng.choice((1, 2, 4, 64, 1024))]
    return bytes(data)


def noise(data: bytearray, rng: Random, header: int) -> bytes:
    at = _place(data, rng, header)
    data[at : at + rng.choice((1, 4, 32))] = rng.randbytes(rng.choice((1, 4, 32)))
    return bytes(data)


KINDS = (truncate, flip, flip, edge, edge, splice, cut, noise)


# Values, as JSON and TOML hold them

GONE = object()  # the key is taken away
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    *(GONE, None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**30, 10**400),
    *(0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "dense", "x" * 20_000, "\0", "\ud800", "../../x", "/etc/passwd", "١٢", "__class__", "a\nb", "{}", "%s"),
    *([], [0], [None], [[]], ["x"], [1, 2], [-1, -1], [2**40, 2**40], [1] * 5000, DEEP),
    *({}, {"": 0}, {"x": {"y": []}}),
)


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Paths of everything inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in items:
        yield (*at, key)
        yield from places(inside, (*at, key))


def replaced(value: Any, at: tuple, by: Any) -> Any:
    """A copy of ``value`` with another thing at a path, or nothing."""
    found = copy.deepcopy(value)
    holder = found
    for key in at[:-1]:
        holder = holder[key]
    if by is GONE:
        del holder[at[-1]]
    else:
        holder[at[-1]] = by
    return found


def twisted(value: Any, seed: int, count: int | None = None) -> Iterator[tuple[str, Any]]:
    """Copies of a value with one place changed to one of ``VALUES``: all of them, or ``count`` drawn ones."""
    pairs = [(at, by) for at in places(value) for by in VALUES]
    if count is not None and count < len(pairs):
        pairs = Random(seed).sample(pairs, count)
    for at, by in pairs:
        yield f"{'.'.join(map(str, at))} = {'gone' if by is GONE else repr(by)[:60]}", replaced(value, at, by)
