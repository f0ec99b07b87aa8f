"""The training loop: epochs of steps, a test after each, checkpoints from which it continues bit for bit."""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from .. import execution
from ..cohort import Cohort, Learner
from ..data import DataBundle
from ..methods import Method
from ..nn import FeatureFusion
from ..ops.augment import normalization_table
from ..tasks import Score
from . import checkpoint, saving
from .autotune import choice_table, choose
from .buffers import average_buffers
from .checkpoint import Snapshot
from .config import ResolvedConfig
from .errors import TrainingError
from .evaluation import score_split
from .feeding import evaluation_feed, task_for, training_feed
from .files import replace_text
from .layout import to_channels_last
from .log import MetricLog
from .processes import SINGLE, Processes
from .report import Reporter
from .schedule import learning_rate_factor, ramp_up
from .signals import Stopped, StopSignal
from .step import TrainStep

__all__ = ["Trainer", "TrainingError"]

PLAN_FILE = "plan.json"
_TRIAL_BATCHES = 4
_MOST_ROLLBACKS = 3
_MOST_SKIPPED = 50


@dataclass
class Position:
    """Where a run stands: ``step`` steps into ``epoch``. After the last step of an epoch only its test is missing."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    best: float = -1.0
    best_epoch: int = -1


class Trainer:
    """One run of one learner in one folder.

    Args:
        config: a resolved config.
        data: what it trains and tests on.
        learner: on the CPU, freshly built, the same in every process.
        folder: exists; gets checkpoints and metrics.
        reporter: shows progress.
        stop: polled after every batch of training and test.
        processes: those that share the run's batches; the first one alone writes.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        data: DataBundle,
        learner: Learner,
        folder: Path,
        reporter: Reporter,
        stop: StopSignal,
        processes: Processes = SINGLE,
    ) -> None:
        self.config, self.data, self.folder, self.reporter, self.stop = config, data, folder, reporter, stop
        self.processes = processes
        self.device = torch.device(config.device)
        method = cast(Method, learner.method)
        method.attach(data.train.targets)
        self.learner = learner.to(self.device)
        if config.channels_last:
            to_channels_last(self.learner, self.device)
        if processes.count > 1:
            for fusion in (module for module in learner.modules() if isinstance(module, FeatureFusion)):
                fusion.sync_batch_norm = True
        if config.compile:
            for cohort in (module for module in learner.modules() if isinstance(module, Cohort)):
                for part in filter(None, (cohort.trunk, *cohort.sub_networks)):
                    part.compile()
        self.task = task_for(config, data)
        self.feed = training_feed(
            config, data.train, self.device, processes, lead=self.task.mixes, views=method.num_views
        )
        self.test_feed = evaluation_feed(
            data.test,
            self.device,
            data_on=config.data_on,
            workers=config.workers,
            limit=config.limit_test,
            processes=processes,
        )
        self.loader = self.feed.loader
        table = normalization_table(data.mean, data.std)
        self.plan_name: str | None = None if config.plan == "auto" else config.plan
        self.take_step = TrainStep(
            self.learner,
            self.task,
            table,
            config,
            self.device,
            plan=execution.create(self.plan_name or "serial", self.learner, self.device, processes=processes.count),
            processes=processes,
            batch_of=self.feed.batch,
        )
        self.losses, self.metric = self.take_step.losses, self.take_step.metric
        self.position = Position()
        self.scores: dict[str, Score] = {}
        self._rollbacks = self._skipped_in_a_row = 0
        if processes.count > 1:
            torch.manual_seed(config.seed + (processes.rank << 32))  # what a network draws is each process's own

    @property
    def finished(self) -> bool:
        """Whether every epoch is trained and tested."""
        return self.position.epoch >= self.config.epochs

    @property
    def global_step(self) -> int:
        """Steps taken over the whole run."""
        return self.position.epoch * len(self.loader) + self.position.step

    def run(self, title: str) -> dict[str, Score]:
        """Train to the end and return the last epoch's test scores; raises Stopped after a signal, with all saved."""
        position = {"epoch": self.position.epoch, "step": self.global_step}
        log = MetricLog(self.folder, **position, tensorboard=self.config.tensorboard) if self.processes.main else None
        with self.processes.guarded(), log or contextlib.nullcontext():
            self.log = log
            self.learner.train()
            if self.plan_name is None:
                self._choose_plan()
            with self.reporter.run(title, self.config.epochs, len(self.loader)):
                if self.global_step == 0:
                    self.save()
                while not self.finished:
                    self._train_epoch()
                    self._test_epoch()
        return self.scores

    def _choose_plan(self) -> None:
        """Time the plans that the device offers, take the fastest and note in the run's folder why."""
        processes = self.processes
        candidates = execution.offered(self.device, processes=processes.count, backend=processes.backend)
        several = sum(reason is None for _, reason in candidates) > 1
        choice = choose(
            self.take_step,
            self.feed.sample(_TRIAL_BATCHES if several else 0),
            candidates=candidates,
            images=self.loader.images(0),
            lead=int(self.loader.lead),
            tell=lambda table: None,
        )
        self.plan_name = choice.name
        if any(timing.milliseconds for timing in choice.timings):
            self.reporter.console.print(choice_table(choice))
        else:
            self.reporter.line(f"plan {choice.name}: {choice.why}", style="dim")
        if processes.main:
            text = json.dumps({"plan": choice.name, "timings": [t._asdict() for t in choice.timings]}, indent=2)
            replace_text(self.folder / PLAN_FILE, text + "\n")

    def use_plan(self, name: str) -> None:
        """Run the steps from here on by another plan, which computes the same."""
        self.plan_name = name
        self.take_step.use(execution.create(name, self.learner, self.device, processes=self.processes.count))

    def _train_epoch(self) -> None:
        at, config = self.position, self.config
        self.learner.train()
        self._start_clock()
        for inputs in self.feed.inputs(at.epoch, at.step):
            images = self.loader.images(at.step)
            learning_rate, kl_weight = self._schedule(self.global_step)
            self.take_step.set_schedule(learning_rate=learning_rate, kl_weight=kl_weight)
            self.take_step(inputs, epoch=at.epoch, step=at.step, images=images, lead=int(self.loader.lead))
            if config.sync_buffers == "step":
                average_buffers(self.learner, self.processes)
            self._timed_images += images
            at.step += 1
            self.reporter.step(at.epoch, at.step)
            if at.step % config.log_every == 0 or at.step == len(self.loader):
                self._log_interval()
            every = config.checkpoint_every or len(self.loader)
            if at.step % every == 0 or at.step == len(self.loader):
                self.save()
            self._stop_if_asked()

    def _schedule(self, step: int) -> tuple[float, float]:
        """Return learning rate and λ of a step, counted over the whole run."""
        config = self.config
        factor = learning_rate_factor(
            config.schedule, step, len(self.loader), epochs=config.epochs, milestones=config.milestones,
            gamma=config.gamma, warmup_epochs=config.warmup_epochs,
        )  # fmt: skip
        ramp = ramp_up(step // len(self.loader), config.options["ramp_up_epochs"])
        return config.lr * factor, config.options["kl_weight"] * ramp

    def _start_clock(self) -> None:
        self._clock, self._timed_images = time.perf_counter(), 0

    def _log_interval(self) -> None:
        """Read the losses of the last steps (the one place where training waits for the device) and record them."""
        at = self.position
        means, steps, skipped = self.losses.read(self.processes)
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            self._not_finite(f"the loss is not finite ({', '.join(bad)})")
            return
        self._rollbacks = 0
        self._mind_skipped(skipped, steps)
        seconds = time.perf_counter() - self._clock
        at.seconds += seconds
        self._speed = self._timed_images / seconds
        self._start_clock()
        if not means:
            return
        learning_rate, kl_weight = self._schedule(self.global_step - 1)
        values = {"learning_rate": learning_rate, "kl_weight": kl_weight, "images_per_second": self._speed}
        if self.config.nan == "skip":
            values["skipped_steps"] = skipped
        self._record("train", means | values)
        self.reporter.interval(at.epoch, at.step, means, self._speed)

    def _mind_skipped(self, skipped: int, steps: int) -> None:
        """Tell of skipped steps; TrainingError where nothing but skipping happens."""
        self._skipped_in_a_row = self._skipped_in_a_row + skipped if skipped == steps else 0
        if not skipped:
            return
        at = self.position
        self.reporter.line(
            f"warning: epoch {at.epoch + 1}: {skipped} of the last {steps} steps had a loss or gradients that are not "
            "finite and were skipped",
            style="yellow",
        )
        if self._skipped_in_a_row >= _MOST_SKIPPED:
            raise TrainingError(
                f"by step {at.step} of epoch {at.epoch + 1} the last {self._skipped_in_a_row} steps had to be skipped, "
                f"since their loss or gradients are not finite; {self._remedy()}"
            )

    def _record(self, kind: str, values: dict[str, float]) -> None:
        if self.log is not None:
            self.log.write(kind, self.position.epoch, self.global_step, values)

    def _test_epoch(self) -> None:
        """Test, record, and save; a signal during the test saves the run as it was before it."""
        at = self.position
        self.reporter.testing(at.epoch)
        self.learner.eval()
        with self.take_step.averaged():
            average_buffers(self.learner, self.processes)
            scored = score_split(
                self.learner.predict,
                self.test_feed,
                self.take_step.table,
                self.task,
                processes=self.processes,
                should_stop=lambda: self._signal() is not None,
            )
        if scored is None:
            self._stop_if_asked()
            return
        self.scores = scores = scored.scores
        means = self.losses.epoch_means()
        learning_rate, kl_weight = self._schedule(self.global_step - 1)
        name = self.task.metric_name
        values = {
            **means,
            **{f"train_{name}/{key}": score.value for key, score in self.metric.read(self.processes).items()},
            **{f"test_{name}/{key}": score.value for key, score in scores.items()},
            "learning_rate": learning_rate,
            "kl_weight": kl_weight,
            "seconds": at.seconds,
        }
        self._record("epoch", values)
        self.reporter.epoch(at.epoch, means.get("loss", math.nan), scores, name)
        main = scores[str(self.learner.method.main_output)].value
        at.epoch, at.step = at.epoch + 1, 0
        self.losses.reset()
        self.metric.reset()
        if main > at.best:
            at.best, at.best_epoch = main, at.epoch - 1
            with self.take_step.averaged():
                average_buffers(self.learner, self.processes)
                best = Snapshot(saving.learner_tensors(self), saving.describe(self))
                self.processes.only_main(lambda: checkpoint.write(self.folder / checkpoint.BEST, best))
        self.save()
        self._stop_if_asked()

    def _signal(self) -> int | None:
        """Return the signal on which all processes stop here, None for none."""
        return self.processes.agree(self.stop.signum)

    def _stop_if_asked(self) -> None:
        signum = self._signal()
        if signum is not None:
            self.save()
            raise Stopped(signum)

    def save(self) -> None:
        """Write last.safetensors and keep the one before; where not all is finite no file is touched, see `--nan`."""
        problem = saving.problem(self)
        if problem:
            self._not_finite(problem)
        else:
            self._write()

    def _write(self) -> None:
        taken = saving.take(self)
        folder = self.folder
        self.processes.only_main(
            lambda: checkpoint.write(folder / checkpoint.LAST, taken, keep=folder / checkpoint.PREVIOUS)
        )
        self.processes.saved(folder / checkpoint.LAST)

    def restore(self, snapshot: Snapshot) -> None:
        """Put everything back as `save` found it."""
        saving.put_back(self, snapshot)

    def _not_finite(self, problem: str) -> None:
        """Go back to the last checkpoint's weights and on with the images after these, or raise TrainingError."""
        at = self.position
        where = f"by step {at.step} of epoch {at.epoch + 1} {problem}"
        if self.config.nan != "rollback":
            raise TrainingError(f"{where}; {self._remedy()}")
        if self._rollbacks == _MOST_ROLLBACKS:
            raise TrainingError(f"{where}, after {_MOST_ROLLBACKS} returns to the last checkpoint; {self._remedy()}")
        self._rollbacks += 1
        good = self.processes.only_main(lambda: checkpoint.load_latest(self.folder)[0])
        self.restore(good)
        was, self.position = self.position, at
        if was.epoch != at.epoch:
            self.losses.reset()
            self.metric.reset()
        self.take_step.state.step.fill_(self.global_step)
        self._start_clock()
        self._write()
        self._record("rollback", {"to_epoch": was.epoch, "to_step": was.epoch * len(self.loader) + was.step})
        self.reporter.line(
            f"warning: {where}; back to the weights of epoch {was.epoch + 1}, step {was.step}, and on with the images "
            "that follow",
            style="yellow",
        )

    def _remedy(self) -> str:
        return f"try a smaller --lr or --amp off; the last good checkpoint is {self.folder / checkpoint.LAST}"
