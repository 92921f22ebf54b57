"""The hot loops of a kernel, from its instructions: what they load and store, and how many instructions they take.

Of a loop (or of the code outside of all loops) one path is measured. It has one of the widest loads, as many of the
widest stores as any, and of such paths the fewest instructions: so it is the one that everything is requested of, and
on which nothing rare happens.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

REGISTER = re.compile(r"(?<![A-Z])R(\d+)(\.64)?")
WIDTH = re.compile(r"\.[US]?(8|16|32|64|128)\b")
TABLE = re.compile(r"c\[0x2\]\[(R\d+)(?:\+(0x[0-9a-f]+))?\]")
ENDS = ("BRA", "EXIT", "RET", "BRX", "CALL", "KILL", "BPT")
# Global memory, or by generic addresses, where a row may be in a tile of shared memory.
LOADS, STORES = ("LDG", "LD"), ("STG", "ST")
FUNCTION = 100  # instructions that a call stands for where paths are compared
Graph = dict[int, list[int]]


class Instruction:
    __slots__ = ("arguments", "at", "name", "opcode", "predicate")

    def __init__(self, at: int, opcode: str, operands: str = "", predicate: str = ""):
        self.at, self.opcode, self.predicate = at, opcode, predicate
        self.name, self.arguments = opcode.split(".")[0], operands.split(",")

    def width(self) -> int:
        match = WIDTH.search(self.opcode)
        return int(match[1]) // 8 if match else 4

    def target(self) -> int | None:
        return int(self.arguments[-1], 16) if self.name == "BRA" else None

    def falls_through(self) -> bool:
        if self.name == "BRA":  # BRA.DIV, and BRA with a second predicate, name it first
            return bool(self.predicate) or len(self.arguments) > 1
        return self.name not in ("EXIT", "RET", "BRX", "KILL", "BPT") or bool(self.predicate)

    def reads(self) -> set[int]:
        stores = self.name.startswith(("ST", "RED", "BRX"))
        found = set()
        for argument in self.arguments if stores else self.arguments[1:]:
            for number, wide in REGISTER.findall(argument):
                found |= {int(number), int(number) + bool(wide)}
        return found

    def writes(self) -> range:
        """The registers that a load fills."""
        match = REGISTER.match(self.arguments[0])
        return range(int(match[1]), int(match[1]) + max(1, self.width() // 4)) if match else range(0)


def flow(code: list[Instruction], tables: list[int]) -> tuple[dict[int, list[Instruction]], Graph]:
    """Basic blocks by their address, and what may follow each. `tables`: the targets of indirect branches."""
    bases = sorted({int(m[2] or "0", 16) // 4 for i in code if (m := TABLE.search(",".join(i.arguments)))})
    starts = {0, *tables} | {t for i in code if (t := i.target()) is not None}
    starts |= {i.at + 16 for i in code if i.name in ENDS}
    blocks: dict[int, list[Instruction]] = {}
    for i in code:
        if i.at in starts:
            blocks[i.at] = current = []
        current.append(i)
    after: Graph = {}
    for at, block in blocks.items():
        last = block[-1]
        to = [last.target()] if last.name == "BRA" else []
        if last.name == "BRX":
            loads = [m for i in block if i.name == "LDC" and (m := TABLE.search(i.arguments[-1]))]
            first = int(loads[-1][2] or "0", 16) // 4 if loads else len(tables)
            to = tables[first : min((b for b in bases if b > first), default=len(tables))]
        if last.falls_through():
            to.append(last.at + 16)
        after[at] = [t for t in dict.fromkeys(to) if t in blocks]
    return blocks, after


def in_order(after: Graph) -> list[int]:
    """Blocks that can be reached, each before those that follow it (reverse postorder)."""
    seen, done, stack = {0}, [], [(0, iter(after[0]))]
    while stack:
        at, rest = stack[-1]
        new = next((t for t in rest if t not in seen), None)
        if new is None:
            done.append(at)
            stack.pop()
        else:
            seen.add(new)
            stack.append((new, iter(after[new])))
    return done[::-1]


def find_loops(order: list[int], after: Graph) -> dict[int, set[int]]:
    """The natural loops: by their first block, which dominates the others, the blocks of each."""
    number = {at: i for i, at in enumerate(order)}
    before = defaultdict(list)
    for at in order:
        for to in after[at]:
            before[to].append(at)
    over = {0: 0}  # immediate dominators

    def meet(a: int, b: int) -> int:
        while a != b:
            if number[a] < number[b]:
                a, b = b, a
            a = over[a]
        return a

    changed = True
    while changed:
        changed = False
        for at in order[1:]:
            known = [p for p in before[at] if p in over]
            new = known[0]
            for p in known[1:]:
                new = meet(p, new)
            changed |= over.get(at) != new
            over[at] = new
    loops: dict[int, set[int]] = {}
    for at in order:
        for to in after[at]:
            if number[to] <= number[at] and meet(to, at) == to:
                body = loops.setdefault(to, {to})
                waiting = [at]
                while waiting:
                    p = waiting.pop()
                    if p not in body:
                        body.add(p)
                        waiting += before[p]
    return loops


def is_vector(i: Instruction) -> bool:
    return i.name in ("LDG", "LDS") and i.width() == 16


def loads(i: Instruction, shared: bool) -> bool:
    """Whether this loads elements: from global memory, or (`shared`) a vector from where copies have put it."""
    return i.name in LOADS or (shared and is_vector(i))


def is_funnel(i: Instruction) -> bool:
    """Part of a vector that is put together from two loads."""
    return i.opcode.startswith("SHF.R.U64") and "R" in i.arguments[-2]


@dataclass
class Path:
    depth: int  # 0: outside of all loops
    body: list[Instruction]
    shared: bool  # elements are in shared memory too

    def of(self, *names: str) -> list[Instruction]:
        return [i for i in self.body if i.name in names]

    @property
    def vectors(self) -> list[Instruction]:
        return [i for i in self.body if loads(i, self.shared) and is_vector(i)]

    def widths(self, *names: str) -> list[int]:
        return [i.width() for i in self.of(*names)]

    def elements(self, size: int) -> float:
        """Elements loaded in an iteration. Vectors off 16 bytes are put together from two loads each."""
        vectors = len(self.vectors)
        if vectors:
            return vectors * 16 / size / (2 if sum(map(is_funnel, self.body)) >= vectors else 1)
        widths = self.widths(*LOADS)
        return widths.count(size) or widths.count(max(widths, default=0))

    def in_flight(self) -> int:
        """The most global loads issued before a loaded value is first used."""
        waiting: dict[int, int] = {}  # register: the load that fills it
        underway: list[int] = []
        most = 0
        for k, i in enumerate(self.body * (2 if self.depth else 1)):  # a load may be for the next iteration
            if used := [waiting[r] for r in i.reads() if r in waiting]:
                underway = [load for load in underway if load > max(used)]
                waiting = {r: load for r, load in waiting.items() if load > max(used)}
            if i.name in LOADS:
                underway.append(k)
                most = max(most, len(underway))
                waiting |= dict.fromkeys(i.writes(), k)
        return most


def find_path(
    blocks: dict[int, list[Instruction]],
    after: Graph,
    order: list[int],
    loops: dict[int, set[int]],
    header: int | None,
    shared: bool,
) -> Path | None:
    """The path described above through a loop, or (None) from the kernel's beginning to its end.

    Loops inside are passed by. Outside of loops, where vectors are held in registers and each has a branch of its own,
    a path with the most special functions and loads comes before one with fewer instructions.
    """
    region = set(order) if header is None else loops[header]
    inside: dict[int, int] = {}
    for h, body in sorted(loops.items(), key=lambda loop: -len(loop[1])):
        if h != header and body <= region:
            for at in body:
                inside.setdefault(at, h)
    own = {at: blocks[at] for at in region if at not in inside}
    load = max((i.width() for block in own.values() for i in block if loads(i, shared)), default=0)
    if not load:
        return None
    store = max((i.width() for block in own.values() for i in block if i.name in STORES), default=0)

    def counts(at: int) -> tuple[bool, int, int, int, int]:
        block = own.get(at, [])
        wide = sum(loads(i, shared) and i.width() == load for i in block)
        return (
            wide > 0,
            sum(i.name in STORES and i.width() == store for i in block),
            0 if header is not None else sum(i.name == "MUFU" for i in block),
            0 if header is not None or any(map(is_funnel, block)) else wide,
            -sum(FUNCTION if i.name == "CALL" else i.name != "NOP" for i in block),
        )

    start = 0 if header is None else header
    begin = counts(start)
    best = {(start, begin[0]): (begin[1:], None)}  # (block, whether it had a load): what it took, from where
    ends = []
    for at in (a for a in order if a in region and inside.get(a, a) == a):
        members = loops[at] if at in inside else (at,)
        onward = {inside.get(t, t) for m in members for t in after[m] if t in region} - {at}
        for loaded in (False, True):
            if (at, loaded) not in best:
                continue
            taken = best[at, loaded][0]
            if header in (t for m in members for t in after[m]) if header is not None else not onward:
                ends.append((loaded, taken, (at, loaded)))
            for to in onward - {header}:
                more = counts(to)
                state = to, loaded or more[0]
                new = tuple(a + b for a, b in zip(taken, more[1:], strict=True))
                if state not in best or best[state][0] < new:
                    best[state] = new, (at, loaded)
    if not ends:
        return None
    state, passed = max(ends)[2], []
    while state:
        passed.append(state[0])
        state = best[state][1]
    body = [i for at in reversed(passed) for i in own.get(at, []) if i.name != "NOP"]
    depth = 0 if header is None else sum(header in body_ for body_ in loops.values())
    return Path(depth, body, shared)


def paths_of(code: list[Instruction], tables: list[int], shared: bool) -> list[Path]:
    """One path of every loop that loads, and one outside of loops."""
    blocks, after = flow(code, tables)
    order = in_order(after)
    loops = find_loops(order, after)
    return [p for h in (None, *loops) if (p := find_path(blocks, after, order, loops, h, shared))]


@dataclass(frozen=True)
class Elements:
    """How the elements of an iteration are counted."""

    size: int  # bytes
    streams: int = 1  # arrays of which each element has one
    of_iteration: int = 0  # given where loads do not tell
    heaviest: bool = False  # reading loops are several sweeps: the heaviest is meant; else the lightest


@dataclass
class Hot:
    """Of the hot loops: bytes of the widest load and store, loads in flight, instructions an element, calls.

    `read`: the loop that loads without storing; `write`: the loop that stores, or the whole of a kernel that holds its
    elements in registers. 0: there is none.
    """

    load: int = 0
    store: int = 0
    flight: int = 0
    read: float = 0
    write: float = 0
    calls: int = 0


def hot(code: list[Instruction], tables: list[int], count: Elements) -> Hot:
    copies = [i.width() for i in code if i.name == "LDGSTS"]
    tiled = bool(copies) and any(
        i.name == "LD" for i in code
    )  # loops over a tile of rows, or over device memory
    staying = bool(copies) and not tiled  # rows in shared memory come first
    paths = paths_of(code, tables, staying)
    looped = [p for p in paths if p.depth and p.elements(count.size)]
    held = [p for p in paths if not p.depth and min(len(p.vectors), p.widths("STG").count(16)) >= 4]

    def hottest(candidates: list[Path], shared_first: bool) -> list[Path]:
        def rank(p: Path) -> tuple[float, ...]:
            shared = shared_first and any(i.name == "LDS" for i in p.vectors)
            heavy = len(p.body) if count.heaviest and not p.of(*STORES) else -len(p.body)
            return shared, bool(p.vectors), p.depth, p.elements(count.size), heavy

        return sorted(candidates, key=rank)[-1:]

    reading = [p for p in looped if not p.of(*STORES)]
    writing = hottest([p for p in looped if p.of(*STORES)], staying)
    if writing and writing[0].vectors:  # what goes one by one is not hot then
        reading = [p for p in reading if p.vectors]
    loading = hottest([p for p in reading if p.of(*LOADS)], False) or writing
    reading = hottest(reading, staying)
    if held and all(len(held[0].vectors) >= len(p.vectors) for p in writing):
        reading, writing, loading = [], held, held

    def instructions(found: list[Path]) -> float:
        of_each = [
            len(p.body) / (count.of_iteration or p.elements(count.size) / count.streams) for p in found
        ]
        return round(sum(of_each), 1)

    wide = [w for p in (*reading, *writing, *loading) for w in p.widths(*LOADS, "LDGSTS")]
    out = [w for p in writing for w in p.widths(*STORES)]
    if tiled:  # between device memory and the tile
        wide, out = copies, [i.width() for i in code if i.name == "STG"] if out else []
    return Hot(
        max(wide, default=0),
        max(out, default=0),
        max((p.in_flight() for p in loading), default=0),
        instructions(reading),
        instructions(writing),
        sum(len(p.of("CALL")) for p in (*reading, *writing)),
    )
