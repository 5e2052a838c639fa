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
_GOODBYE = 15  # seconds for what is being drawn, when the run is stopped
_PAUSES = (0.5, 1, 2, 5, 10)  # seconds between looks for a lost server


class Painter(Protocol):
    """What draws: `server.Server`, or a worker of `cluster`."""

    name: str

    def draw(self, graph: dict[str, Any], output: str) -> bytes: ...

    def check(self) -> None: ...

    def close(self) -> None: ...


class _Work:
    """The units that are left, shared by the threads."""

    def __init__(self, groups: list[list[Unit]]) -> None:
        self._groups = deque(deque(group) for group in groups)
        self._own: dict[str, deque[Unit]] = {}
        self._left = sum(map(len, groups))
        self._tries: Counter[tuple[type, str]] = Counter()
        self._changed = threading.Condition()
        self.lost: dict[str, float] = {}  # since when, and why
        self.why: dict[str, str] = {}
        self.problem: Problem | None = None
        self.counts: Counter[str] = Counter()

    @property
    def is_over(self) -> bool:
        return self._left == 0 or self.problem is not None

    def take(self, server: str) -> Unit | None:
        """The server's next unit, of the prompt it is at if any are left; None if all are drawn."""
        with self._changed:
            while not self.is_over:
                own = self._own.get(server)
                if not own and self._groups:
                    own = self._own[server] = self._groups.popleft()
                if own:
                    return own.popleft()
                self._changed.wait(1)  # others may lose theirs
            return None

    def give_back(self, unit: Unit, server: str, error: Exception) -> None:
        """Let another server, or this one later, draw it; too many times is a problem."""
        with self._changed:
            kind = next(kind for kind in _TRIES if isinstance(error, kind))
            self.counts["again"] += 1
            self._tries[kind, unit.path] += 1
            self._groups.appendleft(deque([unit]))
            if kind is Lost and (own := self._own.pop(server, None)):
                self._groups.append(own)  # what else this server would have drawn
            if self._tries[kind, unit.path] >= _TRIES[kind]:
                self.stop(f"{unit.path} failed {_TRIES[kind]} times, at last on {server}: {error}")
            self._changed.notify_all()

    def finish(self) -> None:
        with self._changed:
            self.counts["images"] += 1
            self._left -= 1
            self._changed.notify_all()

    def stop(self, why: str) -> None:
        with self._changed:
            self.problem = self.problem or Problem(why)
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait(seconds)


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
        If the workflow does not run, or all servers stay lost. What was drawn is kept.
    """
    groups = [[unit for unit in group if unit.path not in store.done] for group in plan.groups()]
    work = _Work([group for group in groups if group])
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
    away = dict(work.lost)
    bar.set_postfix_str(f"{len(painters) - len(away)} of {len(painters)} servers", refresh=False)
    since = max(away.values(), default=0.0)
    if len(away) == len(painters) and time.monotonic() - since > patience:
        why = "; ".join(f"{name}: {why}" for name, why in work.why.items())
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
            work.stop(f"{painter.name} refuses the workflow: {error}")
        except OSError as error:  # a full disk, say
            work.stop(str(error))
        except Exception as error:
            work.stop(f"{type(error).__name__}: {error}")
            raise
        else:
            bar.update()
            work.finish()


def _wait_for(painter: Painter, work: _Work, bar: Any) -> None:
    """Come back when the server answers, or there is nothing left for it."""
    work.lost.setdefault(painter.name, time.monotonic())
    pauses = list(_PAUSES)
    while not work.is_over:
        try:
            painter.check()
        except (Lost, Refused) as error:
            if work.why.get(painter.name) != str(error):
                work.why[painter.name] = str(error)
                bar.write(f"{painter.name} does not answer: {error}", file=sys.stderr)
            work.wait(pauses.pop(0) if len(pauses) > 1 else pauses[0])
        else:
            work.lost.pop(painter.name, None)
            work.why.pop(painter.name, None)
            return
