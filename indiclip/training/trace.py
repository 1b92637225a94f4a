"""A trace of torch's profiler -> how long each part of the steps took.

Every instant of a step counts for one part: for that of the kernel which the GPU runs then, else for communication
where there is some, else for what the host is in. Without a GPU the host's operators are in the kernels' place. So
parts add up to the step, and communication is what no computation hides.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

DATA, LOSS, OPTIMIZER, COMMUNICATION = "data", "loss", "optimizer", "communication"
VALIDATION = "validation"  # between steps, and no part of them
OTHER = "other"  # callbacks, logging, Lightning itself
HOST = "waiting for the host"  # of a GPU that has nothing to do
STEP = "ProfilerStep#"  # torch's name of a step

_BACKWARD = "autograd::engine::evaluate_function: "
_EXCHANGES = ("gloo:", "nccl:", "c10d::", "_c10d_functional::", "ncclDevKernel", "ncclKernel")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")

Event = dict[str, Any]  # of Chrome's format: name, cat(egory), ts and dur in microseconds, tid, args


class PartTimes(NamedTuple):
    """How long each part took.

    Attributes:
        seconds: Part -> of a step, the mean.
        step: Seconds of a step, the mean.
        steps: How many there are.
        calls: Part -> how often it was entered in all steps.
        on_device: Times are those of a GPU.
    """

    seconds: dict[str, float]
    step: float
    steps: int
    calls: Counter[str]
    on_device: bool


class _Claim(NamedTuple):
    """A part's claim to some time; of two, the one of more weight counts, then the one that began later."""

    begin: float
    end: float
    weight: int
    part: str


def part_times(events: Iterable[Event], parts: Iterable[str]) -> PartTimes:
    """Divide the steps of a trace.

    Args:
        events: Its `traceEvents`.
        parts: Names of ranges (`record_function`) that are parts; `<part> loss` is of the loss. What lies in one named
            `validation` is left out.
    """
    timed = sorted((e for e in events if e.get("ph") == "X"), key=lambda e: (e["ts"], -e["dur"]))
    steps = [e for e in timed if e["name"].startswith(STEP) and e["cat"] == "user_annotation"]
    validations = [_span(e) for e in timed if e["name"] == VALIDATION and e["cat"] == "user_annotation"]
    timed = [e for e in timed if not any(begin <= e["ts"] < end for begin, end in validations)]
    windows = [window for e in steps for window in _without(_span(e), validations)]
    named = _named(timed, {*parts})
    ranges = _HostParts(named)
    operators = _outermost([e for e in timed if e["cat"] == "cpu_op"])
    of_node = _parts_of_nodes(timed, ranges)
    of_operator = _parts_of_operators(operators, ranges, of_node)
    kernels = [e for e in timed if e["cat"] in _ON_DEVICE]
    if kernels:
        claims = [*_of_kernels(kernels, timed, operators, of_operator), *_waiting(named)]
    else:
        claims = [_claim(e, 3, part) for e, part in zip(operators, of_operator, strict=True) if not _exchanges(e)]
        claims += [_claim(e, 1, part) for e, part in named]
    claims += [_claim(e, 2, COMMUNICATION) for e in timed if _exchanges(e) and (not kernels or e["cat"] in _ON_DEVICE)]
    total = sum(end - begin for begin, end in windows)
    seconds = _divided(claims, windows, HOST if kernels else OTHER)
    calls = Counter(part for e, part in named if part != OTHER)
    calls[LOSS] = sum(e["name"].endswith(" loss") for e, _ in named)
    calls[COMMUNICATION] = sum(
        e["name"].startswith(("gloo:", "nccl:")) and e["cat"] == "user_annotation" for e in timed
    )
    return PartTimes(
        {part: 1e-6 * time / len(steps) for part, time in seconds.items()},
        1e-6 * total / len(steps),
        len(steps),
        calls,
        bool(kernels),
    )


def _span(e: Event) -> tuple[float, float]:
    return e["ts"], e["ts"] + e["dur"]


def _without(window: tuple[float, float], pauses: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """What is left of a window; pauses come one after the other."""
    left, (begin, end) = [], window
    for pause_begin, pause_end in pauses:
        if begin < pause_begin < end:
            left.append((begin, pause_begin))
            begin = pause_end
    return [*left, (begin, end)] if begin < end else left


def _named(timed: list[Event], parts: set[str]) -> list[tuple[Event, str]]:
    """The host's ranges that say what part it is in."""
    found = []
    for e in timed:
        name = e["name"]
        if e["cat"] != "user_annotation":
            continue
        if name in parts or name in (DATA, LOSS):
            found.append((e, name))
        elif name.endswith(" loss") and name.removesuffix(" loss") in parts:
            found.append((e, LOSS))
        elif name.startswith("Optimizer.step#"):
            found.append((e, OPTIMIZER))
        elif name == "backward":
            found.append((e, OTHER))
    return found


class _HostParts:
    """Which part the host is in at a time: that of the range which began last and has not ended."""

    def __init__(self, named: list[tuple[Event, str]]) -> None:
        self._begins, self._of = [float("-inf")], [OTHER]
        open_ranges: list[tuple[float, str]] = []
        for e, part in named:
            self._close(open_ranges, e["ts"])
            open_ranges.append((e["ts"] + e["dur"], part))
            self._note(e["ts"], part)
        self._close(open_ranges, float("inf"))

    def _close(self, open_ranges: list[tuple[float, str]], until: float) -> None:
        while open_ranges and open_ranges[-1][0] <= until:
            end, _ = open_ranges.pop()
            self._note(end, open_ranges[-1][1] if open_ranges else OTHER)

    def _note(self, time: float, part: str) -> None:
        self._begins.append(time)
        self._of.append(part)

    def at(self, time: float) -> str:
        return self._of[bisect_right(self._begins, time) - 1]


def _outermost(operators: list[Event]) -> list[Event]:
    """Those that are not called by another one of the same thread."""
    ends: dict[Any, float] = defaultdict(lambda: float("-inf"))
    found = []
    for e in operators:
        if e["ts"] >= ends[e["tid"]]:
            ends[e["tid"]] = e["ts"] + e["dur"]
            found.append(e)
    return found


def _parts_of_nodes(timed: list[Event], ranges: _HostParts) -> dict[int, str]:
    """Number of a node of the graph -> the part whose operator made it."""
    nodes = {}
    for e in timed:
        number = e.get("args", {}).get("Sequence number")
        if number is not None and e["cat"] == "cpu_op" and not e["args"].get("Fwd thread id"):
            nodes[number] = ranges.at(e["ts"])
    return nodes


def _parts_of_operators(operators: list[Event], ranges: _HostParts, of_node: dict[int, str]) -> list[str]:
    """One of the backward pass is of the part of its node; one that adds up gradients, of that before it."""
    found, last = [], OTHER
    for e in operators:
        if e["name"].startswith(_BACKWARD):
            last = of_node.get(e["args"].get("Sequence number"), last)
            found.append(last)
        else:
            found.append(ranges.at(e["ts"]))
    return found


def _of_kernels(
    kernels: list[Event], timed: list[Event], operators: list[Event], of_operator: list[str]
) -> list[_Claim]:
    """A kernel is of the part of the operator that has launched it."""
    begins: dict[Any, list[float]] = defaultdict(list)
    of_thread: dict[Any, list[tuple[Event, str]]] = defaultdict(list)
    for e, part in zip(operators, of_operator, strict=True):
        begins[e["tid"]].append(e["ts"])
        of_thread[e["tid"]].append((e, part))
    launchers = {
        e["args"]["External id"]: e for e in timed if e["cat"] == "cpu_op" and "External id" in e.get("args", {})
    }
    claims = []
    for kernel in kernels:
        launcher, part = launchers.get(kernel.get("args", {}).get("External id")), OTHER
        if launcher is not None:
            _, part = of_thread[launcher["tid"]][bisect_right(begins[launcher["tid"]], launcher["ts"]) - 1]
        if not _exchanges(kernel):
            claims.append(_claim(kernel, 3, part))
    return claims


def _waiting(named: list[tuple[Event, str]]) -> list[_Claim]:
    """Of a GPU without work: for data, where the host does."""
    return [_claim(e, 1, DATA) for e, part in named if part == DATA]


def _exchanges(e: Event) -> bool:
    return bool(e["name"].startswith(_EXCHANGES)) and e["cat"] in ("user_annotation", "cpu_op", "kernel")


def _claim(e: Event, weight: int, part: str) -> _Claim:
    return _Claim(*_span(e), weight, part)


def _divided(claims: list[_Claim], windows: list[tuple[float, float]], otherwise: str) -> dict[str, float]:
    """Part -> its time in the windows."""
    times: dict[str, float] = defaultdict(float)
    cuts = sorted({cut for claim in claims for cut in claim[:2]} | {cut for window in windows for cut in window})
    begins, alive, next_claim, next_window = sorted(claims), [], 0, 0
    for now, then in pairwise(cuts):
        while next_claim < len(begins) and begins[next_claim].begin <= now:
            alive.append(begins[next_claim])
            next_claim += 1
        alive = [claim for claim in alive if claim.end > now]
        while next_window < len(windows) and windows[next_window][1] <= now:
            next_window += 1
        if next_window < len(windows) and windows[next_window][0] <= now:
            best = max(alive, key=lambda claim: (claim.weight, claim.begin), default=None)
            times[otherwise if best is None else best.part] += then - now
    return dict(times)
