"""Signs of life between the processes of a run, so that none waits for ever for one that is gone.

A collective operation does not always notice that a process died: a kernel of NCCL waits on the device, and a machine
that lost its power closes no connection. So a thread of each process counts up a number of its own in the store that
torchrun (or process 0) keeps, once a second, and looks at those of the others: process 0 at all of them, the others at
that of process 0, who passes on what it found. The load on the store grows linearly with the number of processes. The
thread needs nothing of the main thread but the interpreter lock now and then, so that a long compilation, save or test
looks alive. A second thread looks whether the first gets its answers, since the store may fall silent as well.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch import distributed as dist

from .errors import ProcessLost

__all__ = ["Heartbeat", "meet"]

BEAT = 1.0
"""Seconds between two signs of life."""

SILENCE = 15
"""Beats of the observer without a new sign of life, after which a process counts as lost.

Its own beats and not seconds, so that a process that was stopped for a while blames nobody for that time.
"""

GRACE = 10.0
"""Seconds that a process has to end by itself, with its own error, once another one has failed."""

LEAVE = 30.0
"""Seconds that a process waits at its end for the others' last words, if even the store is silent."""

PATIENCE = 3
"""Beats that `Heartbeat.culprit` waits to see who is silent."""

_LEFT, _FAILED, _NOTHING = "left", "failed ", "-"


class Heartbeat:
    """Beats for one process and watches the others, from `start` to `leave`.

    Args:
        store: shared by the processes of this run alone; a client of its own, since one that waits blocks the rest.
        rank, hosts: number of this process, and the machine of each, as `meet` returns them.
        remedy: what to do when a process is lost; called when that happens.
        keeper: who keeps the store, for the message when it is gone.
    """

    def __init__(
        self, store: dist.Store, rank: int, hosts: Sequence[str], *, remedy: Callable[[], str], keeper: str
    ) -> None:
        self._store, self._rank, self._hosts = store, rank, hosts
        self._remedy, self._keeper = remedy, keeper
        others = [other for other in range(len(hosts)) if other != rank]
        self._others = others
        self._watched = others if rank == 0 else [0]
        self._seen = dict.fromkeys(self._watched, _NOTHING)
        self._unchanged = dict.fromkeys(self._watched, 0)
        self._beats = self._answered = self._looked_at = self._unanswered = 0
        self._failure: tuple[str, float] | None = None
        self._silent: list[int] = []
        self._spared_until = self._leave_by = 0.0
        self._one_speaks, self._ending = threading.Lock(), False
        self._stop, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="fflfast-heartbeat", daemon=True)
        self._second = threading.Thread(target=self._run_second, name="fflfast-heartbeat-2", daemon=True)

    def start(self) -> None:
        """Begin to beat and to watch."""
        self._thread.start()
        self._second.start()

    def beat(self) -> None:
        """Send one sign of life and look at the others; ends the process where it must. The thread's work."""
        try:
            self._beats += 1
            self._store.set(_key(self._rank), str(self._beats))
            reason = self._watch()
        except RuntimeError:
            reason = self._store_is_gone()
        self._answered = self._beats
        if reason and not self._stop.is_set():
            self._end(reason)

    def oversee(self) -> None:
        """End the process where the store does not answer: a machine without power closes no connection.

        The second thread's work, once a beat: what asks the store waits for it.
        """
        self._unanswered = self._unanswered + 1 if self._answered == self._looked_at else 0
        self._looked_at = self._answered
        # While the process leaves, nothing beats.
        left_too_late = self._stop.is_set() and time.monotonic() >= self._leave_by
        if left_too_late or (self._unanswered >= SILENCE and not self._stop.is_set()):
            self._say(self._store_is_gone())
            os._exit(1)

    def name(self, rank: int) -> str:
        """Return how a message calls a process."""
        return f"process {rank} of {len(self._hosts)} on {self._hosts[rank]}"

    def spare(self) -> None:
        """Leave the main thread some seconds to end by itself: it has found out that a process is lost."""
        with self._one_speaks:
            self._spared_until = time.monotonic() + GRACE
            ending = self._ending
        if ending:
            time.sleep(GRACE)  # a thread of this one has said why already, and ends the process any moment

    def culprit(self) -> str | None:
        """Return which process is gone or failed, and how that is known; None where all are well.

        Waits for some beats, of which a process that lives sends at least one.
        """
        try:
            before = self._read(self._others)
            for _ in range(PATIENCE):
                time.sleep(BEAT)
                now = self._read(self._others)
                if known := self._passed_on() or next(filter(None, map(self._reason, self._others, now)), None):
                    return known
        except RuntimeError:
            return self._store_is_gone()
        self._silent = [k for k, old, new in zip(self._others, before, now, strict=True) if old == new != _LEFT]
        if self._silent:
            return f"{self._names(self._silent)} {'is' if len(self._silent) == 1 else 'are'} lost"
        left = [other for other, value in zip(self._others, now, strict=True) if value == _LEFT]
        return f"{self._names(left)} left the run before its end" if left else None

    def leave(self, error: BaseException | None, *, together: bool, keeps_store: bool) -> bool:
        """Stop beating and say why this process ends; return whether process 0 ends with the same error.

        Args:
            error: None for a normal end.
            together: all processes end now, so wait a while for each other.
            keeps_store: this process takes the store with it, so wait for the others to have read why.
        """
        self._leave_by = time.monotonic() + LEAVE
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(GRACE)
        mine = _LEFT if error is None else _FAILED + _describe(error)
        same = False
        try:
            self._store.set(_key(self._rank), mine)
            if together:
                self._await(lambda: all(v.startswith((_LEFT, _FAILED)) for v in self._read(self._others)))
            if error is not None and self._rank > 0:
                same = self._await(lambda: self._read([0])[0] == mine, 2 * BEAT)
            if not keeps_store:
                self._store.set(f"gone/{self._rank}", "")  # its last word: the store is not needed any more
            else:
                lasting = [f"gone/{other}" for other in self._others if other not in self._silent]
                self._await(lambda: not lasting or self._store.check(lasting))
        except RuntimeError:
            pass  # no store, nobody to tell
        self._over.set()
        if self._second.is_alive():
            self._second.join(GRACE)
        return same

    def _await(self, condition: Callable[[], bool], seconds: float = GRACE + 2 * BEAT) -> bool:
        """Wait until a condition holds, but not for ever; return whether it does."""
        until = time.monotonic() + seconds
        while not (fulfilled := condition()) and time.monotonic() < until:
            time.sleep(BEAT / 20)
        return fulfilled

    def _run(self) -> None:
        while not self._stop.wait(BEAT):
            self.beat()

    def _run_second(self) -> None:
        while not self._over.wait(BEAT):
            self.oversee()

    def _watch(self) -> str | None:
        """Return why this process must end now, None if it need not."""
        if passed_on := self._passed_on():
            return passed_on
        for other, value in zip(self._watched, self._read(self._watched), strict=True):
            if failed := self._reason(other, value):
                self._failure = self._failure or (failed, time.monotonic() + GRACE)
            elif value != _LEFT:
                self._unchanged[other] = self._unchanged[other] + 1 if value == self._seen[other] else 0
                self._seen[other] = value
                if self._unchanged[other] >= SILENCE:
                    return f"{self.name(other)} is lost: no sign of life for {SILENCE * BEAT:.0f} s"
        if self._failure and time.monotonic() >= self._failure[1]:
            return self._failure[0]
        return None

    def _end(self, reason: str) -> None:
        """End the whole process from this thread: what the main thread waits for may never come."""
        with self._one_speaks:
            if time.monotonic() < self._spared_until:
                return
            self._ending = True
        self._say(reason)
        try:
            if self._rank == 0:
                self._store.set("lost", reason)
                time.sleep(2 * BEAT)  # the store may end with this process: let the others read it first
            else:
                self._store.set(_key(self._rank), _FAILED + _describe(ProcessLost(reason)))
                self._store.set(f"gone/{self._rank}", "")
        except RuntimeError:
            pass  # the store is gone already
        os._exit(1)

    def _say(self, reason: str) -> None:
        line = f"fflfast: error: {ProcessLost(reason, self._remedy())}\n"
        os.write(2, line.encode(errors="replace"))  # the main thread may hold the lock of sys.stderr

    def _read(self, ranks: Sequence[int]) -> list[str]:
        return [value.decode() for value in self._store.multi_get([_key(rank) for rank in ranks])]

    def _passed_on(self) -> str | None:
        """Return why process 0 ends, if it has found another one lost."""
        lost = self._store.get("lost").decode()
        return None if lost == _NOTHING else lost

    def _reason(self, rank: int, value: str) -> str | None:
        """Return why a process failed, None if it did not."""
        if not value.startswith(_FAILED):
            return None
        kind, _, text = value.removeprefix(_FAILED).partition(": ")
        # What a process lost says of another one is passed on as it is.
        return text if kind == ProcessLost.__name__ else f"{self.name(rank)} failed with {kind}: {text}"

    def _names(self, ranks: Sequence[int]) -> str:
        return " and ".join(map(self.name, ranks))

    def _store_is_gone(self) -> str:
        return f"{self._keeper}, which keeps the store of the processes, is lost"


def meet(store: dist.Store, rank: int, count: int, host: str, patience: timedelta) -> list[str]:
    """Tell the others that this process is here, wait for all, and return the machine of each.

    Raises:
        ProcessLost: some did not come within ``patience``.
    """
    # Everything that a heartbeat reads must be there first: reading a key that is not would block.
    store.set(_key(rank), _NOTHING)
    if rank == 0:
        store.set("lost", _NOTHING)
    keys = [f"host/{other}" for other in range(count)]
    store.set(keys[rank], host)
    try:
        store.wait(keys, patience)
    except RuntimeError as error:
        try:
            missing = [str(other) for other, key in enumerate(keys) if not store.check([key])]
        except RuntimeError:
            raise ProcessLost("the store of the processes was lost before all of them had started") from error
        who = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(missing)}"
        raise ProcessLost(f"{who} of {count} did not start within {patience.total_seconds():.0f} s") from error
    return [machine.decode() for machine in store.multi_get(keys)]


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _describe(error: BaseException) -> str:
    text = error.reason if isinstance(error, ProcessLost) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())[:1000]}"
