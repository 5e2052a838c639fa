"""Work handed to several servers at once, each taken back when its server fails."""

from __future__ import annotations

import asyncio
import io
import sys
import time
from collections import Counter, deque
from pathlib import Path

from comfy_server import Failed, Lost, Refused, Server
from tqdm import tqdm

from .plan import Plan, Problem, fault, write
from .workflow import Unit

IN_FLIGHT = 2  # pictures that a server has at once: one is drawn, the next waits in its queue
_TRIES = 5  # that one server has at a picture, when no other has failed at it less
_PAUSES = (0.5, 1, 2, 5, 10)  # seconds for a server that fails, longer with each time in a row


class Drawing:
    """A run's drawing, by all servers together: each has an address, `check` and `draw`."""

    def __init__(self, out: Path, plan: Plan, todo: list[Unit], servers: list[Server]) -> None:
        self._out, self._workflow = out, plan.workflow
        self._servers = {server.address: server for server in servers}  # each once
        undrawn = set(todo)
        groups = [deque(unit for unit in group if unit in undrawn) for group in plan.groups()]
        self._groups = [group for group in groups if group]
        self._own: dict[str, deque[Unit]] = {}
        self._left = len(todo)
        self._failures: Counter[tuple[Unit, str]] = Counter()
        self._in_a_row: Counter[str] = Counter()  # failures of a server since it last drew
        self._away = dict.fromkeys(self._servers, "")  # those that do not answer, and why
        self._refused: dict[str, str] = {}  # those that refuse the workflow, and why
        total, pause = len(plan.units()), 0.5 if sys.stderr.isatty() else 30
        counts = {"total": total, "initial": total - len(todo), "unit": "image"}
        self._bar = tqdm(smoothing=0.02, mininterval=pause, **counts)

    async def run(self, patience: float) -> int:
        """Draw all, unless no server answers for so many seconds; how many tries were in vain."""
        with self._bar:
            serving = [self._serve(name) for name in self._servers for _ in range(IN_FLIGHT)]
            await asyncio.gather(self._watch(patience), *serving)
        return sum(self._failures.values())

    async def _watch(self, patience: float) -> None:
        seen = time.monotonic()
        while self._left:
            gone = self._away | self._refused
            there = f"{len(self._servers) - len(gone)} of {len(self._servers)} servers"
            self._bar.set_postfix_str(there, refresh=False)
            seen = time.monotonic() if len(gone) < len(self._servers) else seen
            if time.monotonic() - seen > patience:
                raise Problem(f"No server has answered for {patience / 60:g} minutes: {gone}.")
            await asyncio.sleep(0.1)

    async def _serve(self, name: str) -> None:
        """Draw one unit after another on one server, until none is left for it."""
        await self._wait_for(name)
        while self._left and name not in self._refused:
            if not (unit := self._take(name)):
                await asyncio.sleep(0.1)  # others may fail at theirs
                continue
            try:
                graph = self._workflow.filled(unit)
                picture = await self._servers[name].draw(graph, self._workflow.output)
                if wrong := fault(io.BytesIO(picture), unit, self._workflow):
                    raise Failed(wrong)
                write(self._out, unit.path, picture)
            except (Lost, Failed) as error:
                self._give_back(unit, name)
                self._bar.write(f"{name}: {error}; again: {unit.path}", sys.stderr)
                self._failures[unit, name] += 1
                self._in_a_row[name] += 1
                if self._failures[unit, name] == _TRIES:
                    raise Problem(f"{unit.path} failed {_TRIES} times on {name}: {error}") from None
                await self._wait_for(name)
            except Refused as error:
                self._give_back(unit, name)
                self._refused[name] = str(error)
                if len(self._refused) == len(self._servers):
                    raise Problem(f"Every server refuses the workflow: {error}") from None
                self._bar.write(f"{name} refuses the workflow: {error}", sys.stderr)
            else:
                self._left -= 1
                self._in_a_row.pop(name, None)
                self._bar.update()

    def _take(self, name: str) -> Unit | None:
        """A server's next unit, of the prompt it is at if any are left."""
        if not self._own.get(name):
            # No unit at which another that works has failed less.
            well = self._servers.keys() - {name, *self._away, *self._refused, *self._in_a_row}
            for group in self._groups:
                failures = self._failures[group[0], name]
                if all(self._failures[group[0], other] >= failures for other in well):
                    self._groups.remove(group)
                    self._own[name] = group
                    break
            else:
                return None
        return self._own[name].popleft()

    def _give_back(self, unit: Unit, name: str) -> None:
        """Let whoever is next have a unit, and what else the server had taken."""
        self._groups += filter(None, [deque([unit]), self._own.pop(name, None)])

    async def _wait_for(self, name: str) -> None:
        """Come back when a server answers; one that fails is left alone for a while first."""
        looks = self._in_a_row[name]
        while self._left:
            if looks:
                await asyncio.sleep(_PAUSES[min(looks, len(_PAUSES)) - 1])
            looks += 1
            try:
                await self._servers[name].check()
            except Lost as error:
                if str(error) != self._away.get(name):
                    self._bar.write(f"{name} does not answer: {error}", sys.stderr)
                self._away[name] = str(error)
            else:
                self._away.pop(name, None)
                return
