"""A process for each variant, so that allocators, memory figures and compile caches do not mix."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from .subject import Job, opened

__all__ = ["Refused", "Worker", "started"]


class Refused(Exception):
    """A variant that does not run here; the message says why."""


class Worker:
    """This side of a process that holds one variant and runs what it is asked to, when it is asked."""

    def __init__(self, process: Any, connection: Connection) -> None:
        self._process, self._connection = process, connection

    def wait(self) -> None:
        """Wait until the variant is built; Refused where it cannot be."""
        self._answer()

    def ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the `Subject` there and return what it returns; Refused where it fails."""
        try:
            self._connection.send((method, arguments, options))
        except OSError as error:
            raise Refused(self._end()) from error
        return self._answer()

    def _answer(self) -> Any:
        try:
            good, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise Refused(self._end()) from error
        if not good:
            raise Refused(value)
        return value

    def _end(self) -> str:
        self._process.join(10)
        code = self._process.exitcode
        killed = " (killed, as the system does when memory runs out)" if code == -signal.SIGKILL else ""
        return f"its process ended with exit code {code}{killed}"


@contextlib.contextmanager
def started(job: Job) -> Iterator[Worker]:
    """Start a worker, which is gone when this is left."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, job), daemon=True)
    with _deaf_to_interrupts():
        process.start()
    theirs.close()
    try:
        yield Worker(process, ours)
    finally:
        ours.close()  # ends the worker's loop, also where this process is killed
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Let a process that is started meanwhile ignore Ctrl-C, which reaches the whole group; this one ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python sets handlers in the main thread alone
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(connection: Connection, job: Job) -> None:
    """Answer what comes over the pipe until it is closed."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's messages are for those who debug it
    with contextlib.ExitStack() as stack, contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            subject = stack.enter_context(opened(job))
        except Exception as error:  # whatever data, networks and devices say becomes the reason in the table
            connection.send((False, _reason(error)))
            return
        connection.send((True, None))
        while True:
            method, arguments, options = connection.recv()
            try:
                answer = True, getattr(subject, method)(*arguments, **options)
            except Exception as error:
                answer = False, _reason(error)
            connection.send(answer)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"
