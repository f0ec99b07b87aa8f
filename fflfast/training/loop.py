"""The training loop: epochs of steps, a test after each, checkpoints from which it continues bit for bit."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cohort import Learner
from ..data import DataBundle, Loader
from ..ops.augment import normalization_table
from ..tasks import Score, task_of
from . import checkpoint
from .checkpoint import Snapshot
from .config import ResolvedConfig
from .evaluation import score_split
from .log import Means, MetricLog
from .report import Reporter
from .schedule import learning_rate_factor, ramp_up
from .signals import Stopped, StopSignal
from .step import TrainStep, optimizer_tensors, restore_optimizer, to_device

__all__ = ["Trainer", "TrainingError"]


class TrainingError(RuntimeError):
    """A run that cannot go on; its last good checkpoint stands."""


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
        learner: on the CPU, freshly built.
        folder: exists; gets checkpoints and metrics.
        reporter: shows progress.
        stop: polled after every batch of training and test.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        data: DataBundle,
        learner: Learner,
        folder: Path,
        reporter: Reporter,
        stop: StopSignal,
    ) -> None:
        self.config, self.data, self.folder, self.reporter, self.stop = config, data, folder, reporter, stop
        self.device = torch.device(config.device)
        self.learner = learner.to(self.device)
        if config.channels_last:
            self.learner.to(memory_format=torch.channels_last)
        if config.compile:
            for module in filter(None, (learner.cohort.trunk, *learner.cohort.sub_networks)):
                module.compile()
        self.task = task_of(data.num_classes, seed=config.seed, mixup=config.mixup, cutmix=config.cutmix)
        table = normalization_table(data.mean, data.std)
        self.take_step = TrainStep(self.learner, self.task, table, config, self.device)
        self.loader = _train_loader(config, data, self.device)
        self.position = Position()
        self.losses = Means(("loss", *learner.term_names))
        self.metric = self.task.metric()
        self.scores: dict[str, Score] = {}

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
        with (
            MetricLog(self.folder, **position, tensorboard=self.config.tensorboard) as self.log,
            self.reporter.run(title, self.config.epochs, len(self.loader)),
        ):
            if self.global_step == 0:
                self.save()
            while not self.finished:
                self._train_epoch()
                self._test_epoch()
        return self.scores

    def _train_epoch(self) -> None:
        at, config = self.position, self.config
        self.learner.train()
        self._start_clock()
        for batch in self.loader.epoch(at.epoch, at.step):
            batch = to_device(batch, self.device)
            learning_rate, kl_weight = self._schedule(self.global_step)
            self.take_step.set_schedule(learning_rate=learning_rate, kl_weight=kl_weight)
            output = self.take_step(batch, epoch=at.epoch, step=at.step)
            self.losses.update(output, len(batch.target))
            if not self.task.mixes:
                self.metric.update(output.logits, batch.target)
            self._timed_images += len(batch.target)
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
            config.schedule,
            step,
            len(self.loader),
            epochs=config.epochs,
            milestones=config.milestones,
            gamma=config.gamma,
            warmup_epochs=config.warmup_epochs,
        )
        ramp = ramp_up(step // len(self.loader), config.options["ramp_up_epochs"])
        return config.lr * factor, config.options["kl_weight"] * ramp

    def _start_clock(self) -> None:
        self._clock, self._timed_images = time.perf_counter(), 0

    def _log_interval(self) -> None:
        """Read the losses of the last steps (the one place where training waits for the device) and record them."""
        at = self.position
        means = self.losses.read()
        self._check_losses(means)
        seconds = time.perf_counter() - self._clock
        at.seconds += seconds
        self._speed = self._timed_images / seconds
        self._start_clock()
        learning_rate, kl_weight = self._schedule(self.global_step - 1)
        values = {"learning_rate": learning_rate, "kl_weight": kl_weight, "images_per_second": self._speed}
        self.log.write("train", at.epoch, self.global_step, means | values)
        self.reporter.interval(at.epoch, at.step, means, self._speed)

    def _test_epoch(self) -> None:
        """Test, record, and save; a signal during the test saves the run as it was before it."""
        at = self.position
        self.reporter.testing(at.epoch)
        self.learner.eval()
        scores = score_split(
            self.learner.predict,
            self.data.test,
            self.take_step.table,
            self.task,
            workers=self.config.workers,
            limit=self.config.limit_test,
            should_stop=lambda: self.stop.signum is not None,
        )
        if scores is None:
            self._stop_if_asked()
            return
        self.scores = scores
        means = self.losses.epoch_means()
        learning_rate, kl_weight = self._schedule(self.global_step - 1)
        values = {
            **means,
            **{f"train_{self.task.metric_name}/{name}": score.value for name, score in self.metric.read().items()},
            **{f"test_{self.task.metric_name}/{name}": score.value for name, score in scores.items()},
            "learning_rate": learning_rate,
            "kl_weight": kl_weight,
            "seconds": at.seconds,
        }
        self.log.write("epoch", at.epoch, self.global_step, values)
        self.reporter.epoch(at.epoch, means["loss"], scores, self.task.metric_name)
        main = scores[str(self.learner.method.main_output)].value
        at.epoch, at.step = at.epoch + 1, 0
        self.losses = Means(self.losses.names)
        self.metric = self.task.metric()
        if main > at.best:
            at.best, at.best_epoch = main, at.epoch - 1
            checkpoint.write(self.folder / checkpoint.BEST, Snapshot(self._learner_tensors(), self._info()))
        self.save()
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self.stop.signum is not None:
            self.save()
            raise Stopped(self.stop.signum)

    def save(self) -> None:
        """Write last.safetensors and keep the one before; TrainingError, with no file touched, if not all is finite."""
        self._check_losses(self.losses.peek())
        random = checkpoint.get_random_state(self.device)
        optimizer = optimizer_tensors(self.take_step.optimizer, self.learner)
        tensors = {
            **self._learner_tensors(),
            **{f"optimizer/{name}": tensor for name, tensor in optimizer.items()},
            **{f"random/{name}": tensor for name, tensor in random.tensors.items()},
        }
        info = self._info() | {
            "losses": self.losses.state(),
            "metric": self.metric.state(),
            "random": random.info,
            "scaler": self.take_step.scaler.state_dict(),
        }
        folder = self.folder
        checkpoint.write(folder / checkpoint.LAST, Snapshot(tensors, info), keep=folder / checkpoint.PREVIOUS)

    def restore(self, snapshot: Snapshot) -> None:
        """Put everything back as `save` found it."""
        tensors, info = snapshot
        self.learner.load_state_dict(checkpoint.under(tensors, "learner/"))
        restore_optimizer(self.take_step.optimizer, self.learner, checkpoint.under(tensors, "optimizer/"))
        self.take_step.scaler.load_state_dict(info["scaler"])
        self.position = Position(**info["position"])
        self.take_step.state.step.fill_(self.global_step)
        self.losses.load(info["losses"], self.device)
        self.metric.load(info["metric"], self.device)
        self.scores = {name: Score(*counts) for name, counts in info["scores"].items()}
        checkpoint.set_random_state(Snapshot(checkpoint.under(tensors, "random/"), info["random"]), self.device)

    def _learner_tensors(self) -> dict[str, Tensor]:
        tensors = {f"learner/{name}": tensor for name, tensor in self.learner.state_dict().items()}
        bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.isnan().any()]
        bad += [name for name, parameter in self.learner.named_parameters() if parameter.isinf().any()]
        if bad:
            raise TrainingError(f"{len(bad)} weights are not finite, the first {bad[0]!r}; {self._remedy()}")
        return tensors

    def _info(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "position": asdict(self.position),
            "scores": self.scores,
            "data": describe_data(self.config, self.data),
        }

    def _check_losses(self, means: dict[str, float]) -> None:
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            at = self.position
            raise TrainingError(
                f"by step {at.step} of epoch {at.epoch + 1} the loss is not finite ({', '.join(bad)}); {self._remedy()}"
            )

    def _remedy(self) -> str:
        return f"try a smaller --lr or --amp off; the last good checkpoint is {self.folder / checkpoint.LAST}"


def describe_data(config: ResolvedConfig, data: DataBundle) -> dict[str, Any]:
    """Return what a checkpoint remembers of its data: enough to test on it, and to notice other data of that name."""
    return {
        "data": config.data,
        "image_size": data.image_size,
        "class_names": list(data.class_names),
        "num_classes": data.num_classes,
        "mean": list(data.mean),
        "std": list(data.std),
        "train_images": len(data.train),
    }


def _train_loader(config: ResolvedConfig, data: DataBundle, device: torch.device) -> Loader:
    images = len(data.train) if config.limit_train is None else min(config.limit_train, len(data.train))
    return Loader(
        data.train,
        batch_size=config.batch_size,
        seed=config.seed,
        train=True,
        workers=config.workers,
        drop_last=images % config.batch_size == 1,  # batch normalisation cannot train on a single image
        limit=config.limit_train,
        pin_memory=device.type == "cuda",
    )
