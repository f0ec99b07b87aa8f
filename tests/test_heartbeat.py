"""Signs of life: who notices whom, how soon, and what is said; beat by beat on a store in memory, without threads."""

from __future__ import annotations

import types

import pytest
from torch import distributed as dist

from fflfast.training import heartbeat
from fflfast.training.errors import ProcessLost
from fflfast.training.heartbeat import GRACE, PATIENCE, SILENCE, Heartbeat, meet

REMEDY = "the last checkpoint is runs/a/last.safetensors"


class Ended(BaseException):
    """What os._exit does to a process here."""


class World:
    """Processes that beat when the test says so, on a clock of its own."""

    def __init__(self, monkeypatch, count):
        self.now, self.said, self.gone = 0.0, [], set()
        monkeypatch.setattr(heartbeat, "time", types.SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep))
        monkeypatch.setattr(heartbeat.os, "write", lambda number, text: self.said.append((number, text.decode())))
        monkeypatch.setattr(heartbeat.os, "_exit", self._exit)
        self.store = dist.HashStore()
        hosts = [f"host{rank}" for rank in range(count)]
        for rank in range(count):
            self.store.set(f"host/{rank}", hosts[rank])  # so that the first does not wait for the others
        for rank in range(count):
            assert meet(self.store, rank, count, hosts[rank], heartbeat.timedelta(seconds=5)) == hosts
        self.beats = [
            Heartbeat(self.store, rank, hosts, remedy=lambda: REMEDY, keeper="process 0 of them on host0")
            for rank in range(count)
        ]

    def _sleep(self, seconds):
        self.now += seconds
        for rank in range(len(self.beats)):
            if rank not in self.gone and seconds >= heartbeat.BEAT:
                self.step(rank)

    def _exit(self, code):
        assert code == 1
        raise Ended

    def step(self, rank):
        """One beat of a process; whether it lives on."""
        self.gone.add(rank)  # it does not beat while it ends
        try:
            self.beats[rank].beat()
        except Ended:
            return False
        self.gone.discard(rank)
        return True

    def run(self, beats):
        """Let all that live beat so often."""
        for _ in range(beats):
            self.now += heartbeat.BEAT
            for rank in range(len(self.beats)):
                if rank not in self.gone:
                    self.step(rank)


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch, 4)


def test_nobody_ends_while_all_beat(world):
    world.run(10 * SILENCE)
    assert world.gone == set()
    assert world.said == []


@pytest.mark.parametrize("lost", [0, 2])
def test_all_end_when_one_falls_silent(world, lost):
    world.run(3)
    world.gone.add(lost)
    world.run(SILENCE - 1)
    assert world.gone == {lost}
    started = world.now
    world.run(4)
    assert world.gone == {0, 1, 2, 3}
    assert world.now - started < 10
    reason = f"process {lost} of 4 on host{lost} is lost: no sign of life for {SILENCE} s"
    assert world.said == [(2, f"fflfast: error: {reason}; {REMEDY}\n")] * 3


def test_one_that_never_beat_is_silent_too(world):
    world.gone.add(1)
    world.run(SILENCE + 3)
    assert world.gone == {0, 1, 2, 3}


def test_a_process_that_was_stopped_blames_nobody(world):
    """SIGSTOP, or a machine that sleeps: the others went on, or did not, while this one could not look."""
    world.run(3)
    world.gone = {1, 2, 3}
    world.run(SILENCE - 1)
    world.gone = {0}
    world.run(SILENCE // 2)
    world.gone = set()
    world.now += 1000
    world.run(2 * SILENCE)
    assert world.gone == set()


def test_one_that_left_is_not_missed(world):
    for rank in (0, 3):
        assert world.beats[rank].leave(None, together=False, keeps_store=False) is False
        world.gone.add(rank)
    world.run(2 * SILENCE)
    assert world.gone == {0, 3}
    assert world.said == []


@pytest.mark.parametrize("failed", [0, 2])
def test_all_end_some_seconds_after_one_failed(world, failed):
    world.run(2)
    world.beats[failed].leave(ValueError("no\nsuch thing"), together=False, keeps_store=False)
    world.gone.add(failed)
    world.run(int(GRACE))
    assert world.gone == {failed}
    world.run(4)
    assert world.gone == {0, 1, 2, 3}
    reason = f"process {failed} of 4 on host{failed} failed with ValueError: no such thing"
    assert world.said == [(2, f"fflfast: error: {reason}; {REMEDY}\n")] * 3


def test_what_one_says_of_a_lost_one_is_passed_on_as_it_is(world):
    world.beats[2].leave(ProcessLost("process 1 of 4 on host1 is lost", "look"), together=False, keeps_store=False)
    world.gone |= {1, 2}
    world.run(int(GRACE) + 4)
    assert {text for _, text in world.said} == {f"fflfast: error: process 1 of 4 on host1 is lost; {REMEDY}\n"}


def test_all_end_when_the_store_is_gone(world):
    class Gone:
        def __getattr__(self, name):
            def fail(*arguments):
                raise dist.DistNetworkError("closed")

            return fail

    for beat in world.beats:
        beat._store = Gone()
    assert world.beats[1].culprit() == "process 0 of them on host0, which keeps the store of the processes, is lost"
    world.run(1)
    assert world.gone == {0, 1, 2, 3}
    reason = "process 0 of them on host0, which keeps the store of the processes, is lost"
    assert {text for _, text in world.said} == {f"fflfast: error: {reason}; {REMEDY}\n"}
    assert world.beats[1].leave(ValueError("x"), together=False, keeps_store=False) is False


def test_a_store_that_does_not_answer_ends_all_within_its_silence(world):
    """A machine without power closes no connection: the beat that asks it never comes back."""
    for _ in range(3):
        world.run(1)
        world.beats[1].oversee()
    for _ in range(SILENCE - 1):
        world.beats[1].oversee()  # while its beat waits
    with pytest.raises(Ended):
        world.beats[1].oversee()
    ((_, text),) = world.said
    assert (
        text
        == f"fflfast: error: process 0 of them on host0, which keeps the store of the processes, is lost; {REMEDY}\n"
    )


def test_a_store_that_answers_late_ends_nobody(world):
    for _ in range(5):
        for _ in range(SILENCE - 1):
            world.beats[1].oversee()
        world.run(1)
        world.beats[1].oversee()
    assert world.said == []


def test_the_main_thread_may_end_by_itself_when_it_knows(world):
    world.run(2)
    world.gone.add(3)
    world.run(SILENCE - 2)
    world.beats[0].spare()
    world.run(int(GRACE) - 1)
    assert world.gone == {3}
    world.run(2)
    assert 0 in world.gone


@pytest.mark.parametrize("asking", [0, 1])
def test_the_culprit_is_who_sends_nothing(world, asking):
    world.run(2)
    assert world.beats[asking].culprit() is None
    world.gone |= {2, asking}
    before = world.now
    assert world.beats[asking].culprit() == "process 2 of 4 on host2 is lost"
    assert world.now - before <= PATIENCE * heartbeat.BEAT
    world.gone.add(3)
    assert world.beats[asking].culprit() == "process 2 of 4 on host2 and process 3 of 4 on host3 are lost"


def test_the_culprit_is_who_failed_or_left(world):
    world.run(2)
    world.gone.add(1)
    world.beats[3].leave(None, together=False, keeps_store=False)
    world.gone.add(3)
    assert world.beats[1].culprit() == "process 3 of 4 on host3 left the run before its end"
    world.beats[2].leave(OSError("disk full"), together=False, keeps_store=False)
    world.gone.add(2)
    assert world.beats[1].culprit() == "process 2 of 4 on host2 failed with OSError: disk full"


def test_the_same_error_as_process_0_has_is_told_there(world):
    world.beats[0].leave(ValueError("same"), together=False, keeps_store=False)
    assert world.beats[1].leave(ValueError("same"), together=False, keeps_store=False) is True
    assert world.beats[2].leave(ValueError("other"), together=False, keeps_store=False) is False
    assert world.beats[3].leave(TypeError("same"), together=False, keeps_store=False) is False


def test_who_keeps_the_store_waits_for_those_who_live_but_not_for_ever(world):
    world.run(2)
    world.gone |= {0, 3}
    assert world.beats[0].culprit() == "process 3 of 4 on host3 is lost"
    world.gone |= {1, 2}
    before = world.now
    world.beats[0].leave(ProcessLost("x"), together=False, keeps_store=True)
    assert GRACE < world.now - before < 2 * GRACE
    for rank in (1, 2):
        world.beats[rank].leave(ProcessLost("x"), together=False, keeps_store=False)
    before = world.now
    world.beats[0].leave(ProcessLost("x"), together=False, keeps_store=True)
    assert world.now == before


def test_who_does_not_start_is_named():
    store = dist.HashStore()
    store.set("host/1", "here")
    with pytest.raises(ProcessLost, match=r"^processes 2, 3 of 4 did not start within 0 s$"):
        meet(store, 0, 4, "here", heartbeat.timedelta(seconds=0.1))
