"""What the processes of tests/test_torchrun.py do: small runs, of which some are disturbed.

torchrun --standalone --nproc-per-node 2 tests/distributed_runs.py killed
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from forked import fork_all
from torch import nn
from training_runs import Noisy, flags, run, small

from fflfast.cli import main
from fflfast.cohort import Cohort, Learner
from fflfast.tasks import classification
from fflfast.tasks.classification import Accuracy
from fflfast.training import feeding, loop, train
from fflfast.training.guard import StepGuard
from fflfast.training.processes import _Several
from fflfast.training.step import TrainStep

Disturbance = Callable[[], None]

NOISY = {"method": "training_runs:Noisy", "checkpoint_every": 2, "epochs": 2, "device": "cpu"}
"""Ten steps, with dropout, so that each depends on the generators of both processes."""

UNEVEN = {"limit_train": 95, "batch_size": 23, "log_every": 1, "seed": 3, "epochs": 2, "device": "cpu"}
"""Shares of 12 and 11 images, and 3 images in the last batch, which leave nothing to the second process."""

FROZEN = {
    "plain": (Cohort, UNEVEN),
    "mixed": (Cohort, {**UNEVEN, "mixup": 0.4, "cutmix": 1.0, "channels_last": False}),
    "streamed": (Cohort, {**UNEVEN, "channels_last": True, "data_on": "host", "workers": 1}),
    "clipped": (Cohort, {**UNEVEN, "clip_norm": 0.5, "nan": "skip", "ema": 0.9}),
    "parts": (Learner, {**UNEVEN, "accumulate": 2}),
}
"""Runs in which the number of processes cannot matter, since the norms of this module keep their statistics.

Parts of a step are other images with another number of processes, so that there the fusion's norms keep them, too.
"""


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def frozen(name: str, **changes) -> Callable[[], None]:
    """A run with norms in eval mode and small test batches: 13, 13, 13, 13 and 8 images."""
    module, settings = FROZEN[name]

    def action():
        module.train = lambda self, mode=True: nn.Module.train(self, False)
        feeding.TEST_BATCH_SIZE = 13
        folder = Path(f"{name}-{os.environ.get('WORLD_SIZE', 1)}")
        train(small(folder, **{**settings, **changes}), quiet=True)

    return action


def noisy(name: str, *disturbances: Disturbance, resume: str | None = None, **changes) -> Callable[[], None]:
    """A run in a folder of this name, by the command line; ``resume`` goes on with another one."""

    def action():
        keep_order(name)
        keep_weights(name)
        for disturb in disturbances:
            disturb()
        given = flags(small(Path(name), **{**NOISY, **changes})) if resume is None else ["--resume", resume]
        raise SystemExit(main(["train", *given]))

    return action


def keep_order(name: str) -> None:
    """Append which images each step sees to NAME-order-RANK.jsonl."""
    original = classification.augment

    def kept(images, index, *, epoch, **options):
        with open(f"{name}-order-{rank()}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([int(epoch), index.tolist()]) + "\n")
        return original(images, index, epoch=epoch, **options)

    classification.augment = kept


def keep_weights(name: str) -> None:
    """Write what a process has at the end of a run to NAME-weights-RANK.pt."""
    original = loop.Trainer.run

    def kept(self, title):
        scores = original(self, title)
        torch.save(self.learner.state_dict(), f"{name}-weights-{rank()}.pt")
        return scores

    loop.Trainer.run = kept


def on(number: int, owner, name: str, call: int, action: Callable[[], None]) -> Disturbance:
    """Let ``action`` happen on one process just before its ``call``-th call of a function."""

    def disturb():
        if rank() != number:
            return
        original, calls = getattr(owner, name), 0

        def counted(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == call:
                action()
            return original(*arguments, **options)

        setattr(owner, name, counted)

    return disturb


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def fail() -> None:
    raise OSError(28, "No space left on device")


def poison(call: int) -> Disturbance:
    """Make the logits of process 1 not a number in one step."""

    def disturb():
        calls, original = 0, Noisy.joint_logits

        def poisoned(self, output, batch):
            nonlocal calls
            calls += 1
            return [z * torch.nan if calls == call and rank() == 1 else z for z in original(self, output, batch)]

        Noisy.joint_logits = poisoned

    return disturb


def suspect(call: int) -> Disturbance:
    """Let process 1 alone find the loss of one step infinite, while all gradients are finite everywhere."""

    def disturb():
        calls, original = 0, StepGuard.judge

        def judged(self, loss, norm):
            nonlocal calls
            calls += 1
            return original(self, loss + (torch.inf if calls == call and rank() == 1 else 0), norm)

        StepGuard.judge = judged

    return disturb


KILLED = {
    "in-training": on(1, TrainStep, "__call__", 8, die),
    "main-in-training": on(0, TrainStep, "__call__", 8, die),
    "in-the-test": on(1, Accuracy, "read", 2, die),
    "main-in-a-save": on(0, os, "fsync", 9, die),
    "in-a-save": on(1, _Several, "only_main", 9, die),
}
STOPPED = {
    "in-training": (143, on(1, TrainStep, "__call__", 7, terminate)),
    "main-at-the-end-of-an-epoch": (130, on(0, TrainStep, "__call__", 5, interrupt)),
    "in-the-test": (143, on(1, Accuracy, "read", 2, terminate)),
    "main-in-a-save": (143, on(0, os, "fsync", 9, terminate)),
}
SPOILED = {
    "disk": noisy("disk", on(0, os, "fsync", 9, fail)),
    "alone": noisy("alone", on(1, TrainStep, "__call__", 8, fail)),
    "raise": noisy("raise", poison(8)),
}
WRONG = {
    "data": {"data": "imagefolder", "data_dir": "nowhere"},
    "plan": {"plan": "graph"},
    "batch-size": {"batch_size": 3},
    "lr": {"lr": -1.0},
    "init": {"init": ["nothing.pt", "nothing.pt"]},
}
GOOD = {
    "untouched": noisy("untouched"),
    "averaged": noisy("averaged", ema=0.8),
    "synchronised": noisy("synchronised", sync_buffers="step"),
    "skip": noisy("skip", poison(3), suspect(8), nan="skip"),
    "rollback": noisy("rollback", poison(8), nan="rollback"),
    "baseline": noisy("baseline", baseline=True, epochs=1),
}


def drive() -> None:
    """Run everything in the working folder; write how the first runs ended to ends-1.json, the resumed to ends-2."""
    run(Path("warm-up"))  # what is imported late is imported once
    singles = {"single": noisy("single"), "stopped-single": noisy("stopped-single", _stop_single)}
    fork_all({**{f"{name}-1": frozen(name) for name in FROZEN}, **singles}, count=1)
    fork_all(
        {
            **{f"{name}-2": frozen(name) for name in FROZEN},
            **GOOD,
            **{f"killed-{name}": noisy(f"killed-{name}", disturb) for name, disturb in KILLED.items()},
            **{f"stopped-{name}": noisy(f"stopped-{name}", disturb) for name, (_, disturb) in STOPPED.items()},
            **SPOILED,
            **{f"wrong-{name}": noisy(f"wrong-{name}", **changes) for name, changes in WRONG.items()},
        }
    )
    Path("ends.json").rename("ends-1.json")
    broken = [f"killed-{name}" for name in KILLED] + [f"stopped-{name}" for name in STOPPED] + ["disk", "alone"]
    for name in broken:
        shutil.copytree(name, f"again-{name}")
    shutil.copytree("stopped-in-training", "fewer")
    fork_all({"fewer": noisy("fewer", resume="fewer")}, count=1)
    again = {f"again-{name}": noisy(f"again-{name}", resume=f"again-{name}") for name in broken}
    fork_all({**again, "more": noisy("more", resume="stopped-single")})
    Path("ends.json").rename("ends-2.json")


_stop_single = on(0, TrainStep, "__call__", 7, terminate)

if __name__ == "__main__":
    kind, folder, changes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    if kind == "frozen":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        frozen(folder, **changes)()
    else:
        noisy(folder, *([KILLED["in-training"]] if kind == "killed" else []), **changes)()
