"""A recipe from the first epoch to the stripped file."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import update_summary
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor, nn

from we_surgery import checkpoint
from we_surgery._util.progress import Progress
from we_surgery.analysis.variants import initialize_excitations
from we_surgery.analysis.weights import sparsity
from we_surgery.converted.convert import convert
from we_surgery.converted.state import is_converted
from we_surgery.converted.strip import strip_with_report
from we_surgery.errors import InputError
from we_surgery.planning.decide import plan
from we_surgery.planning.plans import Plan
from we_surgery.recipes.loaders import Loaders, ProcessInfo, make_loaders, synthetic_loaders
from we_surgery.recipes.recipe import Recipe
from we_surgery.recipes.training_run import TrainingRun

logger = logging.getLogger(__name__)

LAST = "last.pth.tar"


@dataclass(frozen=True)
class RunResult:
    """The result of a run; figures are in percent."""

    recipe: str
    source: str
    published: Mapping[str, float]
    last: Mapping[str, float]  # of the last epoch
    best: Mapping[str, float]
    stripped: Mapping[str, float]  # those of the last epoch, up to rounding
    output_difference: float | None  # the largest on one batch; None with nothing to strip
    training_parameters: int
    deployed_parameters: int
    zeros: float  # share of the deployed weights that are exactly 0, without biases and norms
    file: str  # the deployed state dict


def run_recipe(
    recipe: Recipe,
    data: Path | None,
    output: Path,
    *,
    backbone: Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
    device: str = "cpu",
    workers: int = 4,
    step_batch: int | None = None,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> RunResult | None:
    """Trains, strips and verifies what a recipe says; under ``torchrun`` on several devices.

    Args:
        recipe: the experiment.
        data: folder of the images; not read in a dry run.
        output: folder of the run: ``summary.csv``, checkpoints, ``stripped.pt``, ``result.json``.
        backbone: trained weights of ``model.backbone``, for a recipe that wants them.
        resume: continue from the last checkpoint in ``output``.
        dry_run: two synthetic batches and one epoch in place of the images.
        device: ``cpu``, ``cuda``, ...
        workers: processes that read images.
        step_batch: images of one process in one step; gradients are accumulated to the recipe's
            batch. By default there is nothing to accumulate.
        seed: of initialization and of each epoch.
        progress: called with (batches done, batches in all) of each pass over the data.

    Returns:
        The result; None in every process but the first.
    """
    _check_output(output, resume)
    _check_device(device)
    if recipe.training.sparsity and recipe.form == "attached":
        raise InputError(
            "a recipe with `sparsity` needs the thresholds in the model",
            "Write `form: converted` in it, or pass `--form converted`.",
        )
    if not dry_run:
        _check_given(recipe, data, backbone)
    with _process(device) as process:
        size, accumulation = _divide(recipe.training.batch_size, step_batch, process.processes)
        if dry_run or data is None:
            loaders = synthetic_loaders(recipe, size, batches=2, seed=seed)
            recipe, accumulation = recipe.replace(epochs=1, excite_from=0), 1
        else:
            loaders = make_loaders(recipe, data, size, workers, process)
        torch.manual_seed(seed)
        inputs = next(iter(loaders.validation))[0][:2]
        model = _build(recipe, backbone, inputs).to(process.device)
        planned = _plan(recipe, model, inputs)
        run = TrainingRun(recipe, model, planned, process, len(loaders.train), accumulation, seed)
        try:
            best, last = _train(run, loaders, output, resume, progress)
            return _finish(run, loaders, output, best, last, progress)
        finally:
            run.leave_group()


@contextlib.contextmanager
def _process(device: str) -> Iterator[ProcessInfo]:
    """This process, in its group where ``torchrun`` has started several."""
    placed = init_distributed_device_so(device)
    try:
        yield ProcessInfo(
            torch.device(placed["device"]), placed["global_rank"], placed["world_size"]
        )
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _check_given(recipe: Recipe, data: Path | None, backbone: Path | None) -> None:
    if backbone is None and recipe.backbone:
        raise InputError(
            f"{recipe.title} starts from a trained backbone",
            "Give its weights with --backbone FILE, such as the stripped file of an ImageNet run.",
        )
    if data is None:
        raise InputError("no data folder was given", "Give --data DIR, or try --dry-run.")


def _check_device(device: str) -> None:
    try:
        found = torch.device(device)
        devices = torch.get_device_module(found)
        exists = devices.is_available() and (found.index or 0) < devices.device_count()
    except (RuntimeError, AttributeError):
        exists = False
    if not exists:
        raise InputError(f"there is no device {device!r} here", "Give --device cpu, cuda or mps.")


def _check_output(output: Path, resume: bool) -> None:
    for folder in (output, *output.parents):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file, not a folder", "Give another --output.")
    exists = (output / LAST).exists()
    if resume and not exists:
        raise InputError(f"there is no run to resume in {output}", "Leave out --resume.")
    if not resume and output.exists() and any(output.iterdir()):
        raise InputError(
            f"{output} exists and is not empty",
            "Continue with --resume, or choose another folder with --output.",
        )


def _divide(batch_size: int, step_batch: int | None, processes: int) -> tuple[int, int]:
    """Images per process and step, and steps per update."""
    size = step_batch or batch_size // processes
    accumulation, rest = divmod(batch_size, max(size * processes, 1))
    if rest or not accumulation:
        raise InputError(
            f"a batch of {batch_size} cannot be made of steps of {size} images in each of "
            f"{processes} processes",
            "Give a --step-batch that divides it.",
        )
    return size, accumulation


def _build(recipe: Recipe, backbone: Path | None, inputs: Tensor) -> nn.Module:
    """The network with its transplants; also with its excitations if they are converted."""
    model = recipe.model.build()
    if backbone is not None:
        _load_backbone(model, backbone)
    surgery = dict(recipe.surgery or {})
    if recipe.form == "attached":
        surgery = {"mode": "none", "transplants": surgery.get("transplants")}
        return convert(model, config=surgery, inplace=True) if surgery["transplants"] else model
    if not surgery:
        return model
    model = convert(
        model,
        config=surgery,
        init=recipe.training.init,
        start="paused" if recipe.training.excite_from else "on",
        example_inputs=inputs,  # shift-fed convs are found by what the data does
        inplace=True,
    )
    return initialize_excitations(model, recipe.training.excitation_init)


def _plan(recipe: Recipe, model: nn.Module, inputs: Tensor) -> Plan | None:
    """The plan to attach to the optimizer, if any."""
    if recipe.form == "converted" or recipe.surgery is None:
        return None
    config = {key: value for key, value in recipe.surgery.items() if key != "transplants"}
    found = plan(model, config=config, example_inputs=inputs, form="attached")
    return found if found.excited else None


def _load_backbone(model: nn.Module, file: Path) -> None:
    target = getattr(model, "backbone", None)
    state = checkpoint.read(str(file)).state_dict
    if not isinstance(target, nn.Module) or state is None:
        raise InputError(
            f"{file} cannot be a backbone: "
            + ("the model has none" if state is not None else "it holds no state dict"),
            "Give a state dict, for a network with a module called `backbone`.",
        )
    # The classifier of the backbone's own training is not part of it.
    missing = target.load_state_dict(state, strict=False).missing_keys
    if missing:
        raise InputError(
            f"{file} lacks {len(missing)} tensors of the backbone, such as {missing[0]!r}",
            "Give the stripped state dict of the same network.",
        )


def _train(
    run: TrainingRun, loaders: Loaders, output: Path, resume: bool, progress: Progress
) -> tuple[dict[str, float], dict[str, float]]:
    """The metrics of the best and of the last epoch."""
    first = run.resume(output / LAST) if resume else 0
    saver = None
    history = output / "history.json"
    metrics: list[dict[str, float]] = []
    if run.process.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        saver = run.saver(output)
        if resume:
            if not hasattr(saver, "load_state_dict_from_checkpoint"):
                raise InputError(
                    "this timm version does not restore the best epoch of a run",
                    "Install 1.0.31 or newer (`pip install 'timm>=1.0.31'`).",
                )
            saver.load_state_dict_from_checkpoint(str(output / LAST))
            metrics = json.loads(history.read_text(encoding="utf-8"))[:first]
    board = _tensorboard(output) if run.process.rank == 0 else None
    for epoch in range(first, run.epochs):
        trained = run.train_epoch(loaders.train, epoch, progress)
        found = run.evaluate(run.evaluated, loaders.validation, progress)
        metrics.append(found)
        if saver is None:
            continue
        rate = run.optimizer.param_groups[0]["lr"]
        update_summary(epoch, trained, found, str(output / "summary.csv"), lr=rate)
        history.write_text(json.dumps(metrics), encoding="utf-8")
        saver.save_checkpoint(epoch, metric=next(iter(found.values())))
        if board is not None:
            for name, value in {**trained, **found, "lr": rate}.items():
                board.add_scalar(name, value, epoch)
            board.flush()
        logger.info("epoch %d: %s, %s", epoch + 1, trained, found)
    best = max(metrics, key=lambda row: next(iter(row.values())), default={})
    return best, (metrics[-1] if metrics else {})


def _tensorboard(output: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("tensorboard is not installed; there is summary.csv")
        return None
    return SummaryWriter(str(output))


def _finish(
    run: TrainingRun,
    loaders: Loaders,
    output: Path,
    best: dict[str, float],
    last: dict[str, float],
    progress: Progress,
) -> RunResult | None:
    deployed, difference = run.evaluated.eval(), None
    if is_converted(deployed):
        inputs = next(iter(loaders.validation))[0].to(run.process.device)
        deployed, report = strip_with_report(deployed, example_inputs=inputs)
        difference = report.output_difference
    found = run.evaluate(deployed, loaders.validation, progress)
    if run.process.rank != 0:
        return None
    file = output / "stripped.pt"
    checkpoint.write(deployed.state_dict(), file, "state_dict", force=True)
    result = RunResult(
        recipe=run.recipe.name,
        source=run.recipe.source,
        published=run.recipe.published,
        last=last,
        best=best,
        stripped=found,
        output_difference=difference,
        training_parameters=run.training_parameters,
        deployed_parameters=_parameters(deployed),
        zeros=100 * sparsity(deployed),
        file=str(file),
    )
    (output / "result.json").write_text(json.dumps(asdict(result), indent=2), encoding="utf-8")
    return result


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
