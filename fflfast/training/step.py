"""One training step: augment, forward, one loss, one backward, one optimizer step, and no wait for the device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._pytree import tree_leaves

from ..cohort import Learner, StepOutput, StepState
from ..data import Batch, share
from ..execution import Plan, Serial
from ..methods import Method
from ..nn import FeatureFusion
from ..ops.augment import augment
from ..tasks import Task
from .average import Averages
from .config import ResolvedConfig
from .guard import StepGuard
from .log import Means
from .optimizer import build_optimizer, optimizer_tensors, restore_optimizer
from .processes import SINGLE, Processes

__all__ = ["TrainStep", "build_optimizer", "optimizer_tensors", "restore_optimizer"]

_AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainStep:
    """A step and everything that it changes; ``state`` holds what the schedule sets.

    All that changes in a step changes in place, on the device and without a word to the host, from the images to the
    sums of the metrics, so that a plan may capture the whole step in a CUDA graph.

    Args:
        learner: on the device, in its final memory order.
        task: encodes targets, makes the metric.
        table: float32 (256, 3), see `fflfast.ops.augment.normalization_table`.
        config: a resolved config; ``accumulate``, ``amp``, ``channels_last``, ``clip_norm``, ``ema``, ``nan`` say how.
        device: of the learner and the inputs.
        plan: how the step runs, in use already; None takes `Serial`.
        processes: those that take each step together.
        batch_of: makes the uint8 `Batch` of a step's inputs by operations of the device; None where they are one.

    Attributes:
        plan: see `use`.
        optimizer, scaler, state: see `changing`.
        losses: means of loss and terms over the images of this process.
        metric: of the task, over the images of this process; nothing is counted where the task mixes images.
        averages: of the weights, None unless the config asks for them.

    Raises:
        ValueError: ``nan`` is skip on a device whose optimizer cannot leave out a step by itself.
    """

    def __init__(
        self,
        learner: Learner,
        task: Task,
        table: Tensor,
        config: ResolvedConfig,
        device: torch.device,
        *,
        plan: Plan | None = None,
        processes: Processes = SINGLE,
        batch_of: Callable[[Any], Batch] | None = None,
    ) -> None:
        self.learner, self.task, self.config, self.device = learner, task, config, device
        self.processes = processes
        task.prepare(device)
        self.table = table.to(device)
        # What the first layer would round to, images may be from the start; mixing comes before, in full precision.
        self._table = self.table if task.mixes else self.table.to(_AMP_DTYPES.get(config.amp, table.dtype))
        self._batch_of = batch_of
        method = cast(Method, learner.method)
        options = method.options
        self.state = StepState(
            device, ce_weight=options.ce_weight, temperature=options.temperature, learning_rate=config.lr
        )
        self._known: dict[str, float] = {}  # what the host last wrote into the state
        self.optimizer = build_optimizer(learner, config)
        self._fused = bool(self.optimizer.defaults["fused"])
        if self._fused:
            for group in self.optimizer.param_groups:
                group["lr"] = self.state.learning_rate
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.scaler.scale(torch.zeros((), device=device))  # makes its tensors, which a graph must find in place
        self.losses = Means(("loss", *learner.term_names), device)
        self.metric = task.metric(method.graph.logit_names, device)
        self.averages = Averages(learner, config.ema) if config.ema else None
        self._guard = None
        if config.nan == "skip":
            if not self._fused:
                raise ValueError(
                    f"nan: skip needs a fused optimizer, which {device.type} lacks; take raise or rollback"
                )
            self._guard = StepGuard(learner, processes.max_ if processes.count > 1 else None)
        self._own_norms = list(_own_norms(learner))
        self.plan: Plan = plan or Serial(learner, device, processes=processes.count)
        self._model = self._wrap()

    def _wrap(self) -> nn.Module:
        with self.plan.construction():
            return self.processes.wrap(self.learner)

    def use(self, plan: Plan) -> None:
        """Take the next steps by another plan, and close the one before."""
        self.plan.close()
        self.plan = plan
        if self.processes.count > 1:
            # A plan says on which stream gradients are accumulated, which is fixed when the learner is wrapped. The old
            # wrapper has to be gone by then, since it keeps the nodes that know its stream.
            self._model = self.learner
            gc.collect()
            self._model = self._wrap()

    def set_schedule(self, *, learning_rate: float, kl_weight: float) -> None:
        """Set what changes over a run; fills device scalars where a value is new, reads none."""
        self._set("learning_rate", learning_rate)
        self._set("kl_weight", kl_weight)
        if not self._fused:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate

    def _set(self, name: str, value: float) -> None:
        if self._known.get(name) != value:
            getattr(self.state, name).fill_(value)
            self._known[name] = value

    def changing(self) -> list[Tensor]:
        """Return every tensor that a step changes, the same objects each time.

        The schedule's scalars are not among them: the host sets them.
        """
        # GradScaler itself offers no more than copies on the host.
        scaler = (self.scaler._scale, self.scaler._growth_tracker) if self.scaler.is_enabled() else ()
        return [
            *self.learner.parameters(),
            *self.learner.buffers(),
            *(value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)),
            *(value for value in scaler if value is not None),
            *(self.averages.state() if self.averages else ()),
            *self.losses.tensors(),
            *self.metric.tensors(),
            self.state.step,
        ]

    def __call__(self, inputs: Any, *, epoch: int, step: int, images: int | None = None, lead: int = 0) -> StepOutput:
        """Take one step.

        Args:
            inputs: this process's share of a batch, on the device, as ``batch_of`` takes it; may have no image.
            epoch: counted from 0.
            step: counted within the epoch.
            images: in this step, over all processes; None: those of the inputs.
            lead: how many leading rows serve only as neighbours for mixing.

        Returns:
            Loss and terms, means over this process's images, and its logits; detached, valid until the next step.
        """
        self._set("epoch", epoch)
        self._set("batch", step)
        if images is None:
            images = next(len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)) - lead
        capture = images == self.config.batch_size
        try:
            return self.plan(self._body, (inputs, images, lead), capture=capture, changing=self.changing)
        except BaseException:
            self.optimizer.zero_grad(set_to_none=True)  # whoever goes on must not find half a step's gradients
            raise

    def _body(self, arguments: tuple[Any, int, int]) -> StepOutput:
        """The whole step, as a plan runs it: everything that it needs of the host decides how a graph looks."""
        inputs, images, lead = arguments
        batch = self._prepare(inputs, lead)
        rows = len(batch.target)
        if self._guard is not None:
            self._guard.begin()
        with self._evaluating(self._own_norms if rows == 0 else ()):
            output = self._gradients(batch, images)
        bad = self._update(output.loss)
        if self.averages is not None:
            self.averages.update(bad)
        self.losses.update(output, rows, bad)
        if not self.task.mixes:
            self.metric.update(output.logits, batch.target, bad)
        self.state.step.add_(1)
        return output

    def _prepare(self, inputs: Any, lead: int) -> Batch:
        """Return the augmented, normalised and mixed batch of a step's inputs."""
        config, state = self.config, self.state
        batch: Batch = inputs if self._batch_of is None else self._batch_of(inputs)
        images = augment(
            cast(Tensor, batch.images),
            batch.index,
            seed=config.seed,
            epoch=state.epoch,
            pad=config.pad,
            flip=config.flip,
            table=self._table,
            channels_last=config.channels_last,
        )
        images, target = self.task.encode(images, batch.target, epoch=state.epoch, step=state.batch)
        index = batch.index
        if lead:
            images, target, index = images[lead:], target[lead:], index[lead:]
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)  # mixing may have left that order
        return Batch(images, target, index)

    def _gradients(self, batch: Batch, images: int) -> StepOutput:
        """Add up the gradients of the loss, a mean over all images of the step, part by part."""
        rows, parts = len(batch.target), self._count_parts(images)
        outputs, shares = [], []
        for k in range(parts):
            start, stop = k * rows // parts, (k + 1) * rows // parts
            part = batch if parts == 1 else Batch(*(cast(Tensor, value)[start:stop] for value in batch))
            with self._without_reduction() if k < parts - 1 else nullcontext():
                with self.autocast():
                    output: StepOutput = self._model(part, self.state)
                # Several processes take the mean of their gradients, whose weights are the images of each.
                share_of_step = self.processes.count * (stop - start) / max(images, 1)
                loss = output.loss if share_of_step == 1 else output.loss * share_of_step
                self.scaler.scale(loss).backward()
            outputs.append(StepOutput(output.loss.detach(), output.terms, _detached(output.logits)))
            shares.append((stop - start) / max(rows, 1))
        return _joined(outputs, shares)

    def _count_parts(self, images: int) -> int:
        """Return into how many parts every process cuts its share: each has to hold two images, as all norms need."""
        count, most = self.processes.count, self.config.accumulate
        if most == 1:
            return 1
        spans = (share(images, rank, count) for rank in range(count))
        return max(1, min(most, min((stop - start for start, stop in spans if stop > start), default=0) // 2))

    def _without_reduction(self) -> AbstractContextManager:
        model = self._model
        return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()

    def _update(self, loss: Tensor) -> Tensor | None:
        """Let the optimizer take its step; return where it was left out, a 0-dim bool, under ``nan: skip``."""
        optimizer, clip, bad = self.optimizer, self.config.clip_norm, None
        if clip or self._guard is not None:
            self.scaler.unscale_(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = get_total_norm([cast(Tensor, p.grad) for p in parameters])
            if self._guard is not None:
                bad = self._guard.judge(loss, norm)
            if clip:
                clip_grads_with_norm_(parameters, clip, norm)
        if bad is None:
            self.scaler.step(optimizer)
        else:
            # An overflow that the scaler saw shows in the norm.
            cast(Any, optimizer).found_inf = bad
            try:
                optimizer.step()
            finally:
                del cast(Any, optimizer).found_inf
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if bad is None or self._guard is None:
            return None
        bad = bad.bool()
        self._guard.undo(bad)
        return bad

    def averaged(self) -> AbstractContextManager:
        """Return a context in which the learner has the averages of its weights, if the config asks for them."""
        return nullcontext() if self.averages is None else self.averages.applied()

    def autocast(self) -> AbstractContextManager:
        """Return the autocast context of the training forward."""
        dtype = _AMP_DTYPES.get(self.config.amp)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    @contextmanager
    def _evaluating(self, norms: Sequence[nn.Module]) -> Iterator[None]:
        """Let norms use their running statistics while entered: there is nothing to take statistics of."""
        training = [norm for norm in norms if norm.training]
        for norm in training:
            norm.training = False
        try:
            yield
        finally:
            for norm in training:
                norm.training = True


def _own_norms(learner: Learner) -> Iterator[nn.Module]:
    """Batch norms whose statistics are those of one process, so that they cannot train on no image."""
    together = {
        norm
        for module in learner.modules()
        if isinstance(module, FeatureFusion) and module.sync_batch_norm
        for norm in module.modules()
    }
    for module in learner.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm) and module not in together:
            yield module


def _detached(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: z.detach() for name, z in logits.items()}


def _joined(outputs: Sequence[StepOutput], shares: Sequence[float]) -> StepOutput:
    """Return the output of a batch from those of its parts, which hold these shares of its images."""
    if len(outputs) == 1:
        return outputs[0]
    loss = torch.stack([output.loss * part for output, part in zip(outputs, shares, strict=True)]).sum()
    terms = torch.stack([output.terms * part for output, part in zip(outputs, shares, strict=True)]).sum(0)
    return StepOutput(loss, terms, {name: torch.cat([o.logits[name] for o in outputs]) for name in outputs[0].logits})
