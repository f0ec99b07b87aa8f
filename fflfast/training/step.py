"""One training step: augment, forward, one loss, one backward, one optimizer step, and no wait for the device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._pytree import tree_leaves, tree_map

from ..cohort import Learner, StepOutput, StepState
from ..data import Batch, share
from ..execution import Plan, Serial
from ..methods import Method
from ..tasks import Task
from .average import Averages
from .config import ResolvedConfig
from .guard import StepGuard
from .log import Means
from .norms import evaluating, own_norms
from .optimizer import build_optimizers
from .processes import SINGLE, Processes

__all__ = ["TrainStep"]

_AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainStep:
    """A step and everything that it changes; ``state`` holds what the schedule sets.

    All that changes in a step changes in place, on the device and without a word to the host, from the images to the
    sums of the metrics, so that a plan may capture the whole step in a CUDA graph.

    Args:
        learner: on the device, in its final memory order.
        task: makes batches ready, makes the metric.
        table: float32 (256, 3), see `fflfast.ops.augment.normalization_table`.
        config: a resolved config; ``accumulate``, ``amp``, ``channels_last``, ``clip_norm``, ``ema``, ``nan`` say how.
        device: of the learner and the inputs.
        plan: how the step runs, in use already; None takes `Serial`.
        processes: those that take each step together.
        batch_of: makes the uint8 `Batch` of a step's inputs by operations of the device; None where they are one.

    Attributes:
        plan: see `use`.
        optimizers, scaler, state: see `changing`.
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
        self._known: dict[int, float] = {}  # what the host last wrote, by the id of the tensor
        self.optimizers = build_optimizers(learner, config)
        self._fused = all(optimizer.defaults["fused"] for optimizer in self.optimizers)
        self._groups = self._groups_by_peak()
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.scaler.scale(torch.zeros((), device=device))  # makes its tensors, which a graph must find in place
        self.losses = Means(("loss", *learner.term_names), device)
        self.metric = task.metric(method.output_names, device)
        self.averages = Averages(learner, config.ema) if config.ema else None
        self._guard = None
        if config.nan == "skip":
            if not self._fused:
                raise ValueError(
                    f"nan: skip needs a fused optimizer, which {device.type} lacks; take raise or rollback"
                )
            self._guard = StepGuard(learner, processes.max_ if processes.count > 1 else None)
        self._own_norms = own_norms(learner)
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
        """Set what changes over a run; fills device scalars where a value is new, reads none.

        Parameters with a peak rate of their own get as much of it as ``learning_rate`` is of the config's.
        """
        self._set(self.state.kl_weight, kl_weight)
        self._set(self.state.learning_rate, learning_rate)
        for peak, groups in self._groups.items():
            rate = learning_rate if peak == self.config.lr else peak * (learning_rate / self.config.lr)
            for group in groups:
                if self._fused:
                    self._set(group["lr"], rate)
                else:
                    group["lr"] = rate

    def _set(self, scalar: Tensor, value: float) -> None:
        if self._known.get(id(scalar)) != value:
            scalar.fill_(value)
            self._known[id(scalar)] = value

    def _groups_by_peak(self) -> dict[float, list[dict[str, Any]]]:
        """Return the optimizers' groups by their peak rate; fused ones of one peak get one tensor as their rate."""
        found: dict[float, list[dict[str, Any]]] = {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                found.setdefault(group["lr"], []).append(group)
        for peak, groups in found.items() if self._fused else ():
            own = torch.tensor(peak, dtype=torch.float32, device=self.device)
            rate = self.state.learning_rate if peak == self.config.lr else own
            for group in groups:
                group["lr"] = rate
        return found

    def changing(self) -> list[Tensor]:
        """Return every tensor that a step changes, the same objects each time.

        The schedule's scalars are not among them: the host sets them.
        """
        # GradScaler itself offers no more than copies on the host.
        scaler = (self.scaler._scale, self.scaler._growth_tracker) if self.scaler.is_enabled() else ()
        return [
            *self.learner.parameters(),
            *self.learner.buffers(),
            *(
                value
                for optimizer in self.optimizers
                for state in optimizer.state.values()
                for value in state.values()
                if torch.is_tensor(value)
            ),
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
        self._set(self.state.epoch, epoch)
        self._set(self.state.batch, step)
        if images is None:
            images = next(len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)) - lead
        capture = images == self.config.batch_size
        try:
            return self.plan(self._body, (inputs, images, lead), capture=capture, changing=self.changing)
        except BaseException:
            self._drop_gradients()  # whoever goes on must not find half of them
            raise

    def _body(self, arguments: tuple[Any, int, int]) -> StepOutput:
        """The whole step, as a plan runs it: everything that it needs of the host decides how a graph looks."""
        inputs, images, lead = arguments
        batch = self._prepare(inputs, lead)
        rows = len(batch.target)
        if self._guard is not None:
            self._guard.begin()
        with evaluating(self._own_norms if rows == 0 else ()):
            output = self._gradients(batch, images)
        bad = self._update(output.loss)
        with torch.no_grad():
            cast(Method, self.learner.method).after_step(bad)
        if self.averages is not None:
            self.averages.update(bad)
        self.losses.update(output, rows, bad)
        if not self.task.mixes:
            self.metric.update(output.logits, batch.target, bad)
        self.state.step.add_(1)
        return output

    def _prepare(self, inputs: Any, lead: int) -> Batch:
        """Return the batch of a step's inputs as the learner takes it, without the leading rows."""
        batch: Batch = inputs if self._batch_of is None else self._batch_of(inputs)
        batch = self.task.training_batch(
            batch,
            self._table,
            epoch=self.state.epoch,
            step=self.state.batch,
            views=cast(Method, self.learner.method).num_views,
            channels_last=self.config.channels_last,
        )
        return _rows(batch, lead, len(batch.target)) if lead else batch

    def _gradients(self, batch: Batch, images: int) -> StepOutput:
        """Add up the gradients of the loss, a mean over all images of the step, part by part."""
        rows, parts = len(batch.target), self._count_parts(images)
        outputs, shares = [], []
        for k in range(parts):
            start, stop = k * rows // parts, (k + 1) * rows // parts
            part = batch if parts == 1 else _rows(batch, start, stop)
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
        """Let the optimizers take their step; return where it was left out, a 0-dim bool, under ``nan: skip``."""
        clip, bad = self.config.clip_norm, None
        if clip or self._guard is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
            parameters = [p for group in groups for p in group["params"] if p.grad is not None]
            norm = get_total_norm([cast(Tensor, p.grad) for p in parameters])
            if self._guard is not None:
                bad = self._guard.judge(loss, norm)
            if clip:
                clip_grads_with_norm_(parameters, clip, norm)
        for optimizer in self.optimizers:
            if bad is None:
                self.scaler.step(optimizer)
                continue
            # An overflow that the scaler saw shows in the norm.
            cast(Any, optimizer).found_inf = bad
            try:
                optimizer.step()
            finally:
                del cast(Any, optimizer).found_inf
        self.scaler.update()
        self._drop_gradients()
        if bad is None or self._guard is None:
            return None
        bad = bad.bool()
        self._guard.undo(bad)
        return bad

    def _drop_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def averaged(self) -> AbstractContextManager:
        """Return a context in which the learner has the averages of its weights, if the config asks for them."""
        return nullcontext() if self.averages is None else self.averages.applied()

    def autocast(self) -> AbstractContextManager:
        """Return the autocast context of the training forward."""
        dtype = _AMP_DTYPES.get(self.config.amp)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    """Return some rows of a batch, of every view."""
    return tree_map(lambda part: part[start:stop], batch)


def _detached(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: z.detach() for name, z in logits.items()}


def _joined(outputs: Sequence[StepOutput], shares: Sequence[float]) -> StepOutput:
    """Return the output of a batch from those of its parts, which hold these shares of its images."""
    if len(outputs) == 1:
        return outputs[0]
    loss = torch.stack([output.loss * part for output, part in zip(outputs, shares, strict=True)]).sum()
    terms = torch.stack([output.terms * part for output, part in zip(outputs, shares, strict=True)]).sum(0)
    return StepOutput(loss, terms, {name: torch.cat([o.logits[name] for o in outputs]) for name in outputs[0].logits})
