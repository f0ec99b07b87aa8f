"""Several processes of a run at the price of one start of Python: forks of one that has imported everything.

`fork_all` belongs into a process of its own without threads (see `training_runs.start`); its children see the
environment that torchrun would give them, but no torchrun, so that process 0 keeps the store.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

_MOST_SECONDS = 100


def fork_all(actions: Mapping[str, Callable[[], object]], *, count: int = 2, at_once: int = 5) -> None:
    """Run each action in ``count`` processes of one group; write how they ended to ends.json in the working folder.

    For each action: exit codes by rank (negative: the signal), and by rank the seconds from the first end of a process
    to its own. What process R prints comes into NAME-R.out and NAME-R.err. A process that hangs is ended by SIGALRM.
    """
    waiting, running, ends = list(actions), {}, {}
    while waiting or running:
        while waiting and len(running) < at_once * count:
            name = waiting.pop(0)
            port = _free_port()
            for rank in range(count):
                running[_fork(name, actions[name], rank, count, port)] = name, rank
            ends[name] = {"codes": [None] * count, "at": [None] * count}
        pid, status = os.wait()
        name, rank = running.pop(pid)
        ends[name]["codes"][rank] = os.waitstatus_to_exitcode(status)
        ends[name]["at"][rank] = time.monotonic()
    for end in ends.values():
        first = min(end["at"])
        end["seconds"] = [at - first for at in end.pop("at")]
    Path("ends.json").write_text(json.dumps(ends), encoding="utf-8")


def _fork(name: str, action: Callable[[], object], rank: int, count: int, port: int) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}-{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    signal.alarm(_MOST_SECONDS)
    code = 1
    try:
        action()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
