"""Parameter groups for any torch optimizer, with excitations beside their layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from we_surgery.attached.optimizers import same_options
from we_surgery.errors import InputError
from we_surgery.training.vanilla_view import (
    ExcitationParameters,
    excitation_parameters,
    inside_wrappers,
    vanilla_view,
)

Groups = Iterable[Mapping[str, Any]] | Iterable[Any]
PAPER_WEIGHT_DECAY = 1e-4


@dataclass
class Group:
    """One parameter group: its options, and Parameters or ``(name, Parameter)`` pairs."""

    options: dict[str, Any]
    params: list[Any] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor]:
        return [entry[1] if isinstance(entry, tuple) else entry for entry in self.params]


def param_groups(
    model: nn.Module,
    weight_decay: float | None = None,
    *,
    base: Groups | Callable[[nn.Module], Groups] | None = None,
    no_weight_decay: Collection[str] | None = None,
    decay_excitations: bool = True,
    excitation_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of a model, converted or not, for any torch optimizer.

    Weights are decayed, and so are the weight matrices of excitations, as in the WE paper.
    Biases, norm scales and other parameters of at most one dimension are not, nor those named by
    the model's ``no_weight_decay()`` (timm's models have it).

    If you build groups yourself, pass them or your function as ``base``. The function is called
    with the vanilla model, so names, counts and order are those it expects. Each excitation then
    joins the group of its layer's weight. For example, with layer-wise learning rates::

        create_optimizer_v2(model, "adamw", lr=1e-3, param_group_fn=lambda model:
            ws.param_groups(model, base=lambda vanilla: param_groups_layer_decay(vanilla)))

    Args:
        model: the model; also inside DDP or ``torch.compile``.
        weight_decay: of the parameters that are decayed; 1e-4 by default, as in the paper.
        base: groups, or a function from a model to groups, in any form a torch optimizer takes;
            instead of ``weight_decay`` and ``no_weight_decay``. Layers that it leaves out are left
            out with their excitations.
        no_weight_decay: vanilla names, or patterns of names such as ``*.embed``, of parameters
            that are not decayed; by default what ``model.no_weight_decay()`` returns.
        decay_excitations: whether the weight matrices of excitations are decayed where their
            layer is. Their biases never are.
        excitation_lr: a learning rate for the excitations, in separate groups; by default that of
            their layer.

    Returns:
        A list of dicts with ``params``, without the frozen parameters. In each group the
        vanilla parameters come first, in the model's order, then the excitations.

    Raises:
        InputError: ``base`` is combined with ``weight_decay`` or ``no_weight_decay``, or its groups
            belong to another model, such as the original that ``convert`` copied.

    Example:
        >>> model = ws.convert(torchvision.models.resnet18())
        >>> optimizer = torch.optim.SGD(ws.param_groups(model, 1e-4), lr=0.1, momentum=0.9)
    """
    model = inside_wrappers(model)
    view = vanilla_view(model)
    if base is None:
        decay = PAPER_WEIGHT_DECAY if weight_decay is None else weight_decay
        groups = _own_groups(view, decay, no_weight_decay)
    elif weight_decay is not None or no_weight_decay is not None:
        raise InputError(
            "both `base` groups and `weight_decay` or `no_weight_decay` were given",
            "Set them where the base groups are made.",
        )
    else:
        groups = _read_groups(base(view) if callable(base) else base)
        groups = _without(groups, excitation_parameters(model))
        refuse_tensors_of_another_model((t for group in groups for t in group.tensors), model)
    trained = {id(tensor) for group in groups for tensor in group.tensors}
    for excitation in excitation_parameters(model, trained):
        _join(groups, excitation, decay_excitations, excitation_lr, own_rule=base is None)
    return [{"params": list(g.params), **g.options} for g in groups if g.params]


def refuse_tensors_of_another_model(tensors: Iterable[Tensor], model: nn.Module) -> None:
    """Raises if none of the tensors of parameter groups is a parameter of the model."""
    held = {id(tensor) for tensor in tensors}
    if held and not held & {id(parameter) for parameter in model.parameters()}:
        raise InputError(
            "the parameter groups hold none of the model's parameters, so training them would "
            "leave the model as it is",
            "They were made for another model, such as the one that `convert` has copied: "
            "convert with `inplace=True`, or make groups and optimizer from the converted model.",
        )


def find_or_add(groups: list[Group], options: dict[str, Any], after: Group | None = None) -> Group:
    """The group with these options; a new one behind ``after`` or at the end if there is none."""
    for group in groups:
        if same_options(group.options, options):
            return group
    made = Group(options)
    # By identity: groups compare by their tensors, which do not compare to one boolean.
    places = [index for index, group in enumerate(groups) if group is after]
    groups.insert(places[0] + 1 if places else len(groups), made)
    return made


def _own_groups(
    view: nn.Module, weight_decay: float, no_weight_decay: Collection[str] | None
) -> list[Group]:
    if no_weight_decay is None:
        method = getattr(view, "no_weight_decay", None)
        no_weight_decay = method() if callable(method) else ()
    decayed, others = Group({"weight_decay": weight_decay}), Group({"weight_decay": 0.0})
    for name, parameter in view.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim <= 1 or name.endswith(".bias")
        spared = spared or any(fnmatch.fnmatch(name, pattern) for pattern in no_weight_decay)
        (others if spared else decayed).params.append(parameter)
    return [decayed, others]


def _read_groups(base: Groups) -> list[Group]:
    """Groups in each of the forms that torch's optimizers take."""
    entries = list(base)
    if entries and not isinstance(entries[0], Mapping):
        return [Group({}, entries)]
    groups = []
    for entry in entries:
        params = entry["params"]
        options = {key: value for key, value in entry.items() if key != "params"}
        groups.append(Group(options, [params] if isinstance(params, Tensor) else list(params)))
    return groups


def _without(groups: list[Group], excitations: Iterable[ExcitationParameters]) -> list[Group]:
    """The groups without the excitations that the base function has put into them."""
    found = {id(parameter) for e in excitations for _, parameter in e.named}
    for group in groups:
        group.params = [
            entry
            for entry, tensor in zip(group.params, group.tensors, strict=True)
            if id(tensor) not in found
        ]
    return groups


def _join(
    groups: list[Group],
    excitation: ExcitationParameters,
    decay_weights: bool,
    lr: float | None,
    own_rule: bool,
) -> None:
    home = next(
        (g for g in groups if any(tensor is excitation.raw for tensor in g.tensors)),
        # Of our own rule only frozen weights are left out, and those who froze a weight after
        # its conversion may well want to train its excitation.
        groups[0] if own_rule else None,
    )
    if home is None:
        return
    for name, parameter in excitation.named:
        options = dict(home.options)
        if parameter.ndim <= 1 or not decay_weights:
            options["weight_decay"] = 0.0
        if lr is not None:
            options["lr"] = lr
        group = find_or_add(groups, options, after=home)
        is_named = any(isinstance(entry, tuple) for entry in home.params)
        group.params.append((name, parameter) if is_named else parameter)
