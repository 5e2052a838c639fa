"""Work handed to several servers at once, each taken back when its server is lost."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Protocol

from tqdm import tqdm

from .plan import Plan, Problem, Unit
from .server import Failed, Lost, Refused
from .store import NotThePicture, Store
from .workflow import Workflow

IN_FLIGHT = 2
"""Pictures that a server has at once: one is drawn, the next waits in its queue."""
_TRIES = {Lost: 10, Failed: 3, NotThePicture: 3}
"""How often one server may fail at a picture, when no other has failed at it less."""
_GOODBYE = 15  # seconds for what is being drawn, when the run is stopped
_PAUSES = (0.5, 1, 2, 5, 10)  # seconds for a lost server, longer with each loss in a row


class Painter(Protocol):
    """What draws: `server.Server`, or a worker of `cluster`."""

    name: str

    def draw(self, graph: dict[str, Any], output: str) -> bytes: ...

    def check(self) -> None: ...

    def close(self) -> None: ...


class _Work:
    """The units that are left, shared by the threads.

    Attributes
    ----------
    lost, why : dict
        Server -> since when it has not answered, and its reason.
    losses : Counter
        Server -> pictures that it has lost in a row.
    dropped : dict
        Server -> why it takes no more part.
    """

    def __init__(self, groups: list[list[Unit]], servers: Sequence[str]) -> None:
        self._groups = [deque(group) for group in groups]
        self._own: dict[str, deque[Unit]] = {}
        self._left = sum(map(len, groups))
        self._servers = servers
        self._failures: Counter[tuple[str, str]] = Counter()  # by path and server
        self._tries: Counter[tuple[type, str, str]] = Counter()
        self._changed = threading.Condition()
        self.lost: dict[str, float] = {}
        self.why: dict[str, str] = {}
        self.losses: Counter[str] = Counter()
        self.dropped: dict[str, str] = {}
        self.problem: Problem | None = None
        self.counts: Counter[str] = Counter()

    @property
    def is_over(self) -> bool:
        return self._left == 0 or self.problem is not None

    def take(self, server: str) -> Unit | None:
        """The server's next unit, of the prompt it is at if any are left; None if it is done."""
        with self._changed:
            while not self.is_over and server not in self.dropped:
                own = self._own.get(server)
                if not own:
                    fit = (group for group in self._groups if self._may_draw(server, group[0]))
                    if own := next(fit, None):
                        self._groups = [group for group in self._groups if group is not own]
                        self._own[server] = own
                if own:
                    return own.popleft()
                self._changed.wait(1)  # others may lose theirs
            return None

    def _may_draw(self, server: str, unit: Unit) -> bool:
        """Whether no other that works has failed at this unit less often."""
        others = set(self._servers) - {server, *self.lost, *self.losses, *self.dropped}
        failures = self._failures[unit.path, server]
        return all(self._failures[unit.path, other] >= failures for other in others)

    def give_back(self, unit: Unit, server: str, error: Exception) -> None:
        """Let another server, or this one later, draw it; too many times is a problem."""
        with self._changed:
            kind = next(kind for kind in _TRIES if isinstance(error, kind))
            self.counts["again"] += 1
            self._failures[unit.path, server] += 1
            self._tries[kind, unit.path, server] += 1
            self._groups.insert(0, deque([unit]))
            if kind is Lost:
                self.losses[server] += 1
                self._hand_on(server)
            if self._tries[kind, unit.path, server] >= _TRIES[kind]:
                self.stop(f"{unit.path} failed {_TRIES[kind]} times on {server}: {error}")
            self._changed.notify_all()

    def drop(self, unit: Unit, server: str, error: Exception) -> None:
        """Go on without a server that refuses the workflow; if all do, that is a problem."""
        with self._changed:
            self._groups.insert(0, deque([unit]))
            self.dropped[server] = str(error)
            self._hand_on(server)
            if len(self.dropped) == len(self._servers):
                every = "Every server" if len(self._servers) > 1 else server
                self.stop(f"{every} refuses the workflow: {error}")
            self._changed.notify_all()

    def miss(self, server: str, why: str = "") -> bool:
        """Note that a server does not answer; whether its reason is a new one."""
        with self._changed:
            self.lost.setdefault(server, time.monotonic())
            is_new = why not in ("", self.why.get(server))
            self.why[server] = why or self.why.get(server, "")
            return is_new

    def found(self, server: str) -> None:
        """Note that a server answers."""
        with self._changed:
            self.lost.pop(server, None)
            self.why.pop(server, None)

    def _hand_on(self, server: str) -> None:
        """What else a server would have drawn is for the others."""
        if own := self._own.pop(server, None):
            self._groups.append(own)

    def finish(self, server: str) -> None:
        with self._changed:
            self.counts["images"] += 1
            self.losses.pop(server, None)
            self._left -= 1
            self._changed.notify_all()

    def stop(self, why: str) -> None:
        with self._changed:
            self.problem = self.problem or Problem(why)
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Wait that long, or until all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_over, seconds)


def draw(
    plan: Plan,
    workflow: Workflow,
    store: Store,
    painters: Sequence[Painter],
    patience: float,
) -> Counter[str]:
    """Draw what the store lacks.

    Parameters
    ----------
    patience : float
        Seconds to go on for while every server is lost.

    Returns
    -------
    Counter
        How many ``images`` were drawn now, and how many were drawn ``again``.

    Raises
    ------
    Problem
        If the workflow runs on no server, or all stay lost. What was drawn is kept.
    """
    groups = [[unit for unit in group if unit.path not in store.done] for group in plan.groups()]
    work = _Work([group for group in groups if group], [painter.name for painter in painters])
    total = len(plan.units())
    with tqdm(
        total=total,
        initial=len(store.done),
        unit="image",
        smoothing=0.02,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    ) as bar:
        threads = [
            threading.Thread(target=_serve, args=(painter, workflow, store, work, bar), daemon=True)
            for painter in painters
            for _ in range(IN_FLIGHT)
        ]
        for thread in threads:
            thread.start()
        try:
            while not work.is_over:
                work.wait(0.5)
                _look(work, painters, bar, patience)
        except KeyboardInterrupt:
            work.stop("Stopped.")
        for painter in painters:
            painter.close()
        deadline = time.monotonic() + _GOODBYE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
    if work.problem:
        raise Problem(
            f"{work.problem} {len(store.done)} of {total} pictures are kept: the same "
            f"command goes on from there."
        )
    return work.counts


def _look(work: _Work, painters: Sequence[Painter], bar: Any, patience: float) -> None:
    """Show which servers are there; end the run if none has been for too long."""
    left = [painter.name for painter in painters if painter.name not in work.dropped]
    away = {name: since for name in left if (since := work.lost.get(name))}
    bar.set_postfix_str(f"{len(left) - len(away)} of {len(painters)} servers", refresh=False)
    since = max(away.values(), default=0.0)
    if len(away) == len(left) and time.monotonic() - since > patience:
        why = "; ".join(f"{name}: {why}" for name, why in (work.why | work.dropped).items())
        work.stop(f"No server has answered for {patience / 60:g} minutes. ({why})")


def _serve(painter: Painter, workflow: Workflow, store: Store, work: _Work, bar: Any) -> None:
    """One thread: draw unit after unit on one server."""
    _wait_for(painter, work, bar)
    while unit := work.take(painter.name):
        started = time.monotonic()
        try:
            picture = painter.draw(workflow.filled(unit), workflow.output)
            if not workflow.drew(picture, unit):
                raise NotThePicture("another picture than asked for")
            store.add(unit, picture, painter.name, time.monotonic() - started)
        except (Lost, Failed, NotThePicture) as error:
            if not work.is_over:
                said = f"{painter.name}: {error}; will be drawn again: {unit.path}"
                bar.write(said, file=sys.stderr)
            work.give_back(unit, painter.name, error)
            if isinstance(error, Lost):
                _wait_for(painter, work, bar)
        except Refused as error:
            work.drop(unit, painter.name, error)
            if not work.is_over:
                said = f"{painter.name} refuses the workflow, and is left out: {error}"
                bar.write(said, file=sys.stderr)
        except OSError as error:  # a full disk, say
            work.stop(str(error))
        except Exception as error:
            work.stop(f"{type(error).__name__}: {error}")
            raise
        else:
            bar.update()
            work.finish(painter.name)


def _wait_for(painter: Painter, work: _Work, bar: Any) -> None:
    """Come back when the server answers, or there is nothing left for it.

    One that answers and yet loses its pictures is left alone for a while first.
    """
    work.miss(painter.name)
    looks = work.losses[painter.name]
    if looks:
        work.wait(_PAUSES[min(looks, len(_PAUSES)) - 1])
    while not work.is_over:
        try:
            painter.check()
        except (Lost, Refused) as error:
            if work.miss(painter.name, str(error)):
                bar.write(f"{painter.name} does not answer: {error}", file=sys.stderr)
            looks += 1
            work.wait(_PAUSES[min(looks, len(_PAUSES)) - 1])
        else:
            return work.found(painter.name)
