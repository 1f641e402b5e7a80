"""One training run: timm's optimizer, schedule, moving average and checkpoints around a model."""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path
from typing import Any

import torch
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler, random_seed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from we_surgery._util.progress import Progress
from we_surgery.analysis.variants import initialize_excitations
from we_surgery.attached import AttachedExcitation, attach
from we_surgery.converted.sites import Start
from we_surgery.errors import SurgeryError
from we_surgery.planning.plans import Plan
from we_surgery.recipes.loaders import Batches, ProcessInfo
from we_surgery.recipes.recipe import Recipe, Training
from we_surgery.recipes.tasks import loss_of, main_output, make_metric
from we_surgery.training import WESchedule, sparsity_loss

logger = logging.getLogger(__name__)


class TrainingRun:
    """A model in training, vanilla or converted, on its device.

    ``plan`` is attached to the optimizer; it is None where there is nothing to attach. ``steps``
    are the batches of this process in an epoch, ``accumulation`` those that make one update. The
    random numbers of an epoch follow from the seed and its number, so that a run that is resumed
    goes on as it would have.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        plan: Plan | None,
        process: ProcessInfo,
        steps: int,
        accumulation: int,
        seed: int,
    ) -> None:
        settings = recipe.training
        self.recipe, self.process, self.seed = recipe, process, seed
        self.accumulation = accumulation
        self.model = model
        self.optimizer = create_optimizer_v2(
            _parameters(model, settings),
            filter_bias_and_bn=not settings.decay_all,
            **settings.optimizer,
        )
        # Before averages are made of the weights, and before DDP.
        self.attached = None if plan is None else self._attach(plan)
        self.updates = max(steps // accumulation, 1)
        schedule = dict(settings.schedule)
        self.steps_schedule = bool(schedule.pop("per_update", False))
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer,
            num_epochs=settings.epochs,
            step_on_epochs=not self.steps_schedule,
            updates_per_epoch=self.updates,
            **schedule,
        )
        self.average: Any = None
        if settings.ema_decay is not None:
            self.average = ModelEmaV3(model, decay=settings.ema_decay)
        averages = [] if self.average is None else [self.average.module]
        self.excitation = WESchedule(self.attached or model, settings.excite_from, *averages)
        self.scaler: Any = None
        if settings.precision == "float16":
            self.scaler = NativeScaler(device=process.device.type)
        self.trained: nn.Module = model
        if process.processes > 1:
            self.trained = DistributedDataParallel(
                model, device_ids=None if process.device.type == "cpu" else [process.device]
            )

    def _attach(self, plan: Plan) -> AttachedExcitation:
        settings = self.recipe.training
        start: Start = "paused" if settings.excite_from else "on"
        found = attach(self.model, self.optimizer, plan=plan, init=settings.init, start=start)
        return initialize_excitations(found, settings.excitation_init)

    @property
    def training_parameters(self) -> int:
        """Parameters of the network and of what is attached to it."""
        own = sum(parameter.numel() for parameter in self.model.parameters())
        return own + (self.attached.plan.added_parameters if self.attached is not None else 0)

    def leave_group(self) -> None:
        """Lets go of DDP, before the group of processes is destroyed.

        As the group's last holder it would wait for gloo's threads, which wait for the
        interpreter that it does not let go of meanwhile.
        """
        self.trained = self.model

    @property
    def evaluated(self) -> nn.Module:
        """The model whose figures count: the moving average where there is one."""
        return self.average.module if self.average is not None else self.model

    def saver(self, folder: Path) -> CheckpointSaver:
        """Timm's saver, for the first process."""
        return CheckpointSaver(
            self.model,
            self.optimizer,
            model_ema=self.average,
            amp_scaler=self.scaler,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            max_history=1,
        )

    def resume(self, checkpoint: Path) -> int:
        """Resumes from a checkpoint of :meth:`saver`; returns the next epoch."""
        epoch = resume_checkpoint(self.model, str(checkpoint), self.optimizer, self.scaler)
        if self.average is not None:
            load_checkpoint(self.average.module, str(checkpoint), use_ema=True)
        return epoch or 0

    def train_epoch(self, batches: Batches, epoch: int, progress: Progress) -> dict[str, float]:
        """One pass; returns the mean loss."""
        random_seed(self.seed + epoch, self.process.rank)
        sampler: Any = getattr(batches, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        self.excitation.step(epoch)
        if not self.steps_schedule:
            self.scheduler.step(epoch)
        self.trained.train()
        losses = []
        total = len(batches)  # type: ignore[arg-type]
        for step, (images, labels) in enumerate(batches):
            is_last = (step + 1) % self.accumulation == 0 or step + 1 == total
            losses.append(self._step(images, labels, is_last))
            if is_last and self.steps_schedule:
                self.scheduler.step_update(epoch * self.updates + step // self.accumulation + 1)
            progress(step + 1, total)
        loss = torch.stack(losses).mean().item()
        if not math.isfinite(loss):
            raise SurgeryError(
                f"the loss of epoch {epoch + 1} is {loss}: training has diverged",
                "The last checkpoint is from the epoch before; lower the learning rate.",
            )
        return {"loss": loss}

    def _step(self, images: Tensor, labels: Tensor, is_last: bool) -> Tensor:
        device = self.process.device
        images, labels = images.to(device), labels.to(device)
        settings = self.recipe.training
        is_parallel = isinstance(self.trained, DistributedDataParallel)
        waits = contextlib.nullcontext() if is_last or not is_parallel else self.trained.no_sync()  # type: ignore[operator]
        with waits:
            with self._autocast():
                outputs = self.trained(images)
                loss = loss_of(outputs, labels, settings.smoothing)
            if settings.sparsity:
                loss = loss + settings.sparsity * sparsity_loss(self.model)
            share = loss / self.accumulation
            if self.scaler is not None:
                self.scaler(share, self.optimizer, need_update=is_last)
            else:
                torch.autograd.backward(share)
                if is_last:
                    self.optimizer.step()
        if is_last:
            self.optimizer.zero_grad()
            if self.average is not None:
                self.average.update(self.model)
        return loss.detach()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        precision = self.recipe.training.precision
        if precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.process.device.type, getattr(torch, precision))

    def evaluate(self, model: nn.Module, batches: Batches, progress: Progress) -> dict[str, float]:
        """The task's metrics of a model, over all processes."""
        metric = make_metric(self.recipe.task, self.recipe.data.classes, self.process.device)
        total = len(batches)  # type: ignore[arg-type]
        model.eval()
        with torch.no_grad(), self._autocast():
            for step, (images, labels) in enumerate(batches):
                outputs = main_output(model(images.to(self.process.device)))
                metric.update(outputs.float(), labels.to(self.process.device))
                progress(step + 1, total)
        if self.process.processes > 1:
            torch.distributed.all_reduce(metric.counts)
        return metric.result()


def _parameters(model: nn.Module, settings: Training) -> Any:
    """The model, or its parameters in two groups where its backbone learns more slowly."""
    if settings.backbone_lr_scale == 1.0:
        return model
    backbone = list(model.get_submodule("backbone").parameters())
    own = {id(parameter) for parameter in backbone}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in own]
    slower = settings.optimizer["lr"] * settings.backbone_lr_scale
    return [{"params": backbone, "lr": slower}, {"params": rest}]
