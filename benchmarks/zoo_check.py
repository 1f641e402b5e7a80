"""One model of the zoo: read, converted, proven, stripped, compared.

A model passes when

- the converted model was recorded again in eval and in train mode, no operation of either
  reads a converted weight raw;
- every weight the plan excites was computed by its excitation in one of the two;
- classes, keys and the keys' order after strip are what they were before convert;
- every folded weight is bit-equal to the excited one;
- the outputs of the excited and the stripped model agree within 1e-5 of the larger of 1 and the
  largest output, while those outputs are finite, not empty, and not those of the raw weights;
- each conv's and linear's weight has a row in the plan: it is converted, or left alone with a
  reason;
- converted with ``init="preserve"`` in each of four modes, it returns in eval mode what it
  returned before, within 1e-5 of the larger of 1 and the largest output. A model that amplifies
  rounding may differ by twice what its vanilla outputs in float32 differ from those in float64:
  either output is that far from the exact one. Detectors return what they chose by scores that are
  all but equal; there each converted layer is compared instead, given what the vanilla layer is
  given;
- ``plan`` leaves torch's and Python's random generators as they were;
- a new model of the class, run afterwards, returns ordinary tensors, and no fake tensor is alive;
- ``strip_state_dict`` of the converted model's state dict is what ``strip`` leaves, bit for bit;
- saved and loaded twice, as a state dict and (where the vanilla model can be pickled) as a module,
  the converted model has the same tensors and excited weights, bit for bit.
"""

from __future__ import annotations

import copy
import resource
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tsm import tsm_resnet50
from zoo_models import Candidate, build, build_bare, candidates
from zoo_promises import (
    ZooError,
    check_files,
    check_folded_state,
    generators_untouched,
    no_fakes_left,
    note_plain,
    refuse_fake_outputs,
)
from zoo_row import ZooRow

import we_surgery as ws
from we_surgery.converted.bypass import prove_excited
from we_surgery.converted.graphs import ExcitedWeight, excited_weights
from we_surgery.converted.layer import ExcitedLayer, excited_layers
from we_surgery.converted.proof import RELATIVE_TOLERANCE, largest_differences, run_in_eval
from we_surgery.planning.config import make_policy
from we_surgery.planning.decide import decide_layers
from we_surgery.reading import Reading, read
from we_surgery.reading.kinds import kind_of
from we_surgery.reading.running import call

PRESERVED = ("lwe", "mwe", "we", "lwe+mwe")
"""The modes in which a pretrained start is checked."""

_PLAIN = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
Change = Callable[[nn.Module], object]


def check_model(
    name: str,
    mode: str = "we",
    *,
    preserved: Sequence[str] = PRESERVED,
    before: Change | None = None,
    after: Change | None = None,
) -> ZooRow:
    """Takes one model through everything; what goes wrong is in the row, nothing is raised.

    Args:
        name: ``torchvision:...``, ``timm:...`` or of another library.
        mode: as for ``ws.plan``.
        preserved: the modes in which a pretrained start is checked.
        before: changes the vanilla model first; for planted faults.
        after: changes the converted model; for planted faults.
    """
    row = ZooRow(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a builder deprecates is no concern of the zoo
        try:
            _check(row, mode, preserved, before, after)
            row.passed = True
        except ZooError as failure:
            row.cause = str(failure)
        except Exception as error:
            row.cause = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return row


def _check(
    row: ZooRow,
    mode: str,
    preserved: Sequence[str],
    before: Change | None,
    after: Change | None,
) -> None:
    model = build(row.name)
    if before is not None:
        before(model)
    row.parameters = sum(parameter.numel() for parameter in model.parameters())
    with no_fakes_left():
        candidate, reading, raw_outputs = _read(row, model, mode)
    inputs, plan = candidate.inputs, _decide(model, mode, reading)
    _refuse_missing_rows(model, plan)
    note_plain(row, model, plan, _PLAIN)
    fresh = build(row.name)
    refuse_fake_outputs(fresh, inputs)
    _check_preserved(row, model, candidate, reading, preserved)
    classes = [(name, type(module)) for name, module in model.named_modules()]
    shapes = [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]

    with row.timed("convert"):
        model = ws.convert(model, plan=plan, inplace=True)
    if after is not None:
        after(model)
    with row.timed("prove"):
        _prove(model, inputs)
    excited_outputs = run_in_eval(model, inputs)
    raw: dict[str, Tensor] = {}
    if not _finite(excited_outputs) or not sum(output.numel() for output in excited_outputs):
        raw = {path(weight): weight.raw.detach().clone() for weight in excited_weights(model)}
        calibrate(model, inputs)
        excited_outputs = run_in_eval(model, inputs)
    with torch.no_grad():
        excited = {path(weight): weight.excited().clone() for weight in excited_weights(model)}
    folded = ws.strip_state_dict(model.state_dict())
    with row.timed("strip"):
        stripped, _ = ws.strip_with_report(model, inplace=True)

    if [(name, type(module)) for name, module in stripped.named_modules()] != classes:
        raise ZooError("the classes after strip are not those before convert")
    state = stripped.state_dict()
    if [(key, value.shape, value.dtype) for key, value in state.items()] != shapes:
        raise ZooError("the keys after strip are not those before convert")
    unequal = [key for key, value in excited.items() if not torch.equal(state[key], value)]
    if unequal:
        raise ZooError(f"{unequal[0]} is not bit-equal to its excited weight")
    check_folded_state(folded, stripped)
    check_files(row, fresh, plan)
    stripped_outputs = run_in_eval(stripped, inputs)
    if raw:
        stripped.load_state_dict(raw, strict=False)
        raw_outputs = run_in_eval(stripped, inputs)
    _compare(row, raw_outputs, excited_outputs, stripped_outputs)
    tolerance = max(RELATIVE_TOLERANCE, 2 * (row.rounding or 0.0))
    changed = {m: d for m, d in row.preserved.items() if not d <= tolerance}
    if changed:
        raise ZooError(f'init="preserve" changed the outputs: {changed}')


def time_reading(name: str, mode: str) -> dict[str, Any]:
    """What a finished row says of a model's reading, measured anew: times and counts."""
    row = ZooRow(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _read(row, build(name), mode)
    fresh = row.to_dict()
    return {key: fresh[key] for key in ("forward_s", "read_s", "weights", "converted", "alone")}


def path(weight: ExcitedWeight) -> str:
    """The excited weight's key in the vanilla state dict."""
    return f"{weight.module}.{weight.parameter}".lstrip(".")


def calibrate(model: nn.Module, inputs: Any) -> None:
    """Sets the norms' running statistics to those of these inputs.

    With random weights and the statistics of an untrained norm, deep networks overflow.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        call(model.train(), inputs)


def _finite(outputs: Iterable[Tensor]) -> bool:
    return all(bool(output.isfinite().all()) for output in outputs)


def _read(row: ZooRow, model: nn.Module, mode: str) -> tuple[Candidate, Reading, list[Tensor]]:
    """The smallest inputs that the model takes in both modes, its reading, and its outputs."""
    refusals: list[str] = []
    for candidate in candidates(row.name, model):
        try:
            with row.timed("forward"):
                outputs = run_in_eval(model, candidate.inputs)
        except ws.InputError as error:
            refusals.append(_refusal(candidate, str(error)))
            continue
        with row.timed("read"), generators_untouched("plan"):
            reading = read(model, candidate.inputs)
            plan = _decide(model, mode, reading)
        row.input_shape = candidate.shape
        row.note_plan(plan)
        if plan.read_by == "recorded" and not plan.read_by_reason:
            return candidate, reading, outputs
        refusals.append(_refusal(candidate, plan.read_by_reason))
    raise ZooError("no input was recorded in eval and train: " + "; ".join(refusals))


def _decide(model: nn.Module, mode: str, reading: Reading) -> ws.Plan:
    """:func:`we_surgery.plan` of what was read already."""
    return ws.Plan(
        mode=mode,
        read_by=reading.read_by,
        read_by_reason=reading.read_by_reason,
        decisions=decide_layers(model, make_policy(mode), reading),
        model_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _refusal(candidate: Candidate, reason: str) -> str:
    return f"{'x'.join(map(str, candidate.shape))}: {reason.splitlines()[0]}"


def _refuse_missing_rows(model: nn.Module, plan: ws.Plan) -> None:
    """Each weight of a conv, linear or attention module has a row, or is one with a row."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rows = {
        id(parameters.get(f"{decision.module}.{decision.parameter}".lstrip(".")))
        for decision in plan.decisions
    }
    for name, module in model.named_modules():
        if kind_of(module) is None:
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter_name.endswith("weight") and id(parameter) not in rows:
                raise ZooError(f"the plan has no row for {name}.{parameter_name}")


def _prove(model: nn.Module, inputs: Any) -> None:
    excitations = {weight.excitation for weight in excited_weights(model)}
    idle = len(excitations) - prove_excited(model, inputs, ran_in_both=True)
    if idle:
        raise ZooError(f"{idle} of {len(excitations)} excitations never ran")


def _check_preserved(
    row: ZooRow,
    model: nn.Module,
    candidate: Candidate,
    reading: Reading,
    modes: Sequence[str],
) -> None:
    """Converts copies of the vanilla model with ``init="preserve"`` and compares outputs."""
    inputs = candidate.inputs
    outputs = run_in_eval(model, inputs)
    if not _finite(outputs):
        model = copy.deepcopy(model)
        calibrate(model, inputs)
        outputs = run_in_eval(model, inputs)
    for mode in modes:
        plan = _decide(model, mode, reading)
        converted = ws.convert(model, plan=plan, init="preserve")
        row.preserved[mode] = (
            _largest_by_layer(model, converted, inputs)
            if candidate.chooses
            else largest_differences(outputs, run_in_eval(converted, inputs))[1]
        )
    if not max(row.preserved.values(), default=0.0) <= RELATIVE_TOLERANCE:
        row.rounding = largest_differences(_exact_outputs(model, inputs), outputs)[1]


def _exact_outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """What the model returns in float64."""

    def widened(value: Any) -> Any:
        is_real = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if is_real else value

    return run_in_eval(copy.deepcopy(model).double(), tree_map(widened, inputs))


def _largest_by_layer(model: nn.Module, converted: nn.Module, inputs: Any) -> float:
    """The largest difference of an excited layer's outputs from those of the vanilla layer."""
    largest = [0.0]

    def compare(layer: ExcitedLayer, _: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        largest.append(largest_differences([output], [layer(*given)])[1])

    hooks = [
        model.get_submodule(name).register_forward_hook(partial(compare, layer))
        for name, layer in excited_layers(converted.eval())
    ]
    run_in_eval(model, inputs)
    for hook in hooks:
        hook.remove()
    return max(largest)


def _compare(row: ZooRow, raw: list[Tensor], excited: list[Tensor], stripped: list[Tensor]) -> None:
    row.difference = largest_differences(excited, stripped)[1]
    if not row.difference <= RELATIVE_TOLERANCE:
        raise ZooError(f"the stripped outputs differ by {row.difference:.3g}")
    if not sum(output.numel() for output in excited):
        raise ZooError("all outputs are empty, so their comparison proves nothing")
    if not _finite(excited):
        raise ZooError("an output is not finite, so the comparison proves nothing")
    if [output.shape for output in raw] != [output.shape for output in excited]:
        return  # a detector that finds other boxes
    row.effect = largest_differences(raw, excited)[1]
    if row.converted and not row.effect > 0:
        raise ZooError("the excited outputs are those of the raw weights")


def warm_up() -> None:
    """Reads a small network, so that what torch imports then is not on the first model's time."""
    ws.plan(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), example_inputs=torch.randn(1, 3, 8, 8))


def read_without_memory(name: str, mode: str = "we") -> dict[str, Any]:
    """Reads a large model on the meta device: the seconds, and what memory grew by."""
    with torch.device("meta"):
        model = build_bare(name)
    *_, candidate = candidates(name, model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    plan = ws.plan(model, mode, example_inputs=candidate.inputs)
    seconds = time.process_time() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "name": name,
        "parameters": plan.model_parameters,
        "read_by": plan.read_by,
        "converted": len(plan.excited),
        "weights": len(plan.decisions),
        "read_s": round(seconds, 3),
        "peak_memory_grew_by_mib": round((after - before) / 1024, 1),
    }


def read_shift_network(mode: str = "we") -> dict[str, Any]:
    """Reads TSM-ResNet50 on one clip of 8 frames of 224 px: the seconds, beside a forward's."""
    torch.manual_seed(0)
    model, clip = tsm_resnet50(), torch.randn(8, 3, 224, 224)
    start = time.process_time()
    run_in_eval(model, clip)
    forward = time.process_time() - start
    start = time.process_time()
    plan = ws.plan(model, mode, example_inputs=clip)
    seconds = time.process_time() - start
    return {
        "name": "TSM-ResNet50",
        "shift_fed": sum(row.reason.startswith("shift-fed") for row in plan.decisions),
        "forward_s": round(forward, 3),
        "read_s": round(seconds, 3),
    }
