"""The excited layer: an ordinary layer whose ``weight`` is computed from a raw weight.

A layer is excited by swapping its class, in place, for a subclass with a read-only ``weight``
property over a parameter ``raw_weight``. Every reader of ``layer.weight``, the layer's forward or
a parent with a fused kernel, gets the excited weight. A vanilla model refuses to load a converted
checkpoint, because its keys differ.
"""

from __future__ import annotations

import copy
import functools
import importlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from we_surgery.converted.views import (
    folded_parameters,
    raw_view,
    vanilla_view,
)
from we_surgery.errors import ExcitationError, InputError, PartialLoadWarning
from we_surgery.excitations import Composition
from we_surgery.excitations.names import MadeClass, excitation_name, raw_name
from we_surgery.reading.kinds import CONV_KINDS

PUBLIC_PATH = "we_surgery.converted"
"""Where pickles find the excited classes."""

if TYPE_CHECKING:
    _ModuleBase = nn.Module
else:
    # Not an nn.Module: the mixin comes before the vanilla class and must not change its layout.
    _ModuleBase = object


class ExcitedLayer(_ModuleBase):
    """What excited layers add to their vanilla class.

    Attributes:
        vanilla_class: the class before conversion and after strip.
        excited_parameters: the parameters that are computed from raw ones.
    """

    vanilla_class: ClassVar[type[nn.Module]]
    excited_parameters: ClassVar[tuple[str, ...]]
    layer_name: str

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.excited_parameters:
            assign_excited(self, name, value)
            return
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # Tensor parallelism registers `weight` anew, pruning registers `weight_orig`.
        for parameter in self.excited_parameters:
            if name in (parameter, f"{parameter}_orig"):
                raise ExcitationError(
                    f"{name!r} cannot be registered in layer {describe(self)}, whose {parameter!r} "
                    "is computed from a raw weight",
                    "To prune, strip the model (`we_surgery.strip`) and prune the result, or prune "
                    "before converting. To shard, use FSDP2 (`fully_shard`), or ColwiseParallel on "
                    "linear layers with MWE; or leave the layer alone by a rule "
                    "(`we_surgery.Rule(pattern, 'skip')`).",
                )
        super().register_parameter(name, param)

    def fuse(self) -> nn.Module:
        """A vanilla layer with the folded weight, for timm's ``reparameterize_model``."""
        folded = folded_parameters(self)
        memo: dict[int, Any] = {id(parameter): parameter for parameter in folded.values()}
        fused = copy.deepcopy(vanilla_view(self, folded), memo)
        # timm does not look inside what a `fuse` returns, such as an attention layer's out_proj.
        for name, layer in list(excited_layers(fused)):
            fused.set_submodule(name, layer.fuse())
        return fused

    # A vanilla view with the raw weights saves and loads them, since a class may do so in a way of
    # its own (PyTorch Geometric's `Linear` does) and its hooks know the vanilla names.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        saved: Any = OrderedDict()
        raw_view(self)._save_to_state_dict(saved, prefix, keep_vars)
        names = {prefix + name: prefix + raw_name(name) for name in self.excited_parameters}
        for key, value in saved.items():
            destination[names.get(key, key)] = value

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        raw_keys = {prefix + name: prefix + raw_name(name) for name in self.excited_parameters}
        vanilla_keys = {raw: key for key, raw in raw_keys.items()}
        excitations = tuple(f"{prefix}{excitation_name(name)}." for name in self.excited_parameters)
        given: dict[str, Any] = {}
        for key, value in state_dict.items():
            if key in raw_keys and raw_keys[key] in state_dict:
                unexpected_keys += [key] if strict else []
            elif not key.startswith(excitations):
                given[vanilla_keys.get(key, key)] = value
        view = raw_view(self)
        missing: list[str] = []
        view._load_from_state_dict(
            given, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys += [raw_keys.get(key, key) for key in missing]
        for name, parameter in view._parameters.items():
            own_name = raw_name(name) if name in self.excited_parameters else name
            self._parameters[own_name] = parameter
        for name in self.excited_parameters:
            key = prefix + name
            if raw_keys[key] not in state_dict and key not in missing:
                # A vanilla checkpoint: its weight becomes the raw weight, as if it had been loaded
                # before the conversion. The excitation keeps its values, except those that depend
                # on the weight.
                excitation = getattr(self, excitation_name(name))
                kept = excitation.state_dict(prefix=f"{prefix}{excitation_name(name)}.")
                state_dict |= {key: value for key, value in kept.items() if key not in state_dict}
                excitation.prepare(getattr(self, raw_name(name)))
        self._warn_of_left_out(given, prefix)

    def _warn_of_left_out(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Warns if a load has other tensors of the layer, but not its weight.

        Loaders that keep only the keys shared by checkpoint and model do this. A strict load, which
        torch does not announce to layers, raises as well.
        """
        given = [key for key in state_dict if key.startswith(prefix)]
        for name in self.excited_parameters if given else ():
            if prefix + name not in state_dict:
                warnings.warn(
                    f"the state dict has {given[0]!r}, but neither {prefix + name!r} nor "
                    f"{prefix + raw_name(name)!r}: the layer keeps its weight. If you keep only "
                    "the keys that a vanilla checkpoint shares with the model, load it with "
                    "`we_surgery.load_vanilla` instead.",
                    PartialLoadWarning,
                    stacklevel=2,
                )


def excited_property(parameter: str) -> property:
    """A property that computes ``parameter`` by its excitation each time it is read."""
    raw, excitation = raw_name(parameter), excitation_name(parameter)

    def read(self: ExcitedLayer) -> Tensor:
        try:
            # nn.Module.__getattr__ takes ten times as long. The raw weight needs it all the same:
            # torch.fx returns a proxy there during tracing.
            own: Any = self._modules.get(excitation)
            if own is None:
                own = getattr(self, excitation)
            return own(getattr(self, raw))  # type: ignore[no-any-return]
        except AttributeError as error:
            # An AttributeError would make Python call nn.Module.__getattr__, which reports a
            # missing `weight` and hides the cause.
            raise ExcitationError(
                f"the excited {parameter} of layer {describe(self)} cannot be computed: {error}",
                f"Its {raw!r} or {excitation!r} was removed or replaced; convert the model again.",
            ) from error
        except Exception as error:
            _refuse_offloaded(self, parameter, own, error)
            error.add_note(f"while computing the excited {parameter} of layer {describe(self)}")
            raise

    return property(read, doc=f"The excited {parameter}; its raw values are in `{raw}`.")


def _refuse_offloaded(
    layer: ExcitedLayer, parameter: str, excitation: nn.Module, error: Exception
) -> None:
    """Raises if a weight cannot be computed because its excitation is offloaded.

    accelerate moves a module's parameters to the device before that module's forward, but the
    layer's forward reads the excitation.
    """
    tensors = [*excitation.parameters(), *excitation.buffers()]
    if not getattr(layer, raw_name(parameter)).is_meta and any(t.is_meta for t in tensors):
        raise ExcitationError(
            f"the excited {parameter} of layer {describe(layer)} cannot be computed: its "
            "excitation is on the meta device, as accelerate's offloading leaves it",
            "Pass `preload_module_classes=sorted({type(m).__name__ for m in model.modules() if "
            "hasattr(m, 'excitation')})` to accelerate's `cpu_offload` or `dispatch_model`, or "
            "strip the model first.",
        ) from error


def assign_excited(layer: ExcitedLayer, name: str, value: Any) -> None:
    """``layer.weight = nn.Parameter(value)``: stores the raw weight whose excitation is ``value``.

    Only a Parameter, as in torch's layers: :func:`torch.func.functional_call` assigns plain
    tensors, whose gradient a copy into the raw weight would lose.
    """
    raw: Tensor = getattr(layer, raw_name(name))
    if not isinstance(value, nn.Parameter) or value.shape != raw.shape:
        found = f"{type(value).__name__} of shape {tuple(getattr(value, 'shape', ()))}"
        raise InputError(
            f"{name} of layer {describe(layer)} takes a Parameter of shape {tuple(raw.shape)}, "
            f"got {found}",
            f"Assign `nn.Parameter(tensor)` of that shape. For `functional_call`, give "
            f"{raw_name(name)!r} and the excitation's tensors, by the names that "
            "`model.named_parameters()` has for them.",
        )
    excitation: Composition = getattr(layer, excitation_name(name))
    try:
        with torch.no_grad():
            inverse = excitation.right_inverse(value.to(raw))
    except NotImplementedError as error:
        stages = "+".join(stage.name for stage in excitation.stages)
        raise ExcitationError(
            f"{name} of layer {describe(layer)} is computed by {stages} and cannot be assigned: "
            f"{error}",
            f"Assign `{raw_name(name)}` to set the raw weight, or strip the model first.",
        ) from error
    with torch.no_grad():
        raw.copy_(inverse)


def excited_layers(model: nn.Module) -> Iterator[tuple[str, ExcitedLayer]]:
    """Each excited layer of ``model`` once, with its first name."""
    for name, module in model.named_modules():
        if isinstance(module, ExcitedLayer):
            yield name, module


def describe(layer: ExcitedLayer) -> str:
    """The layer's name and class, for messages."""
    return f"{layer.layer_name!r} ({layer.vanilla_class.__name__})"


# What an excited class overrides, by the vanilla class.


def _raw_initializer(method: str) -> Callable[[ExcitedLayer], None]:
    """A method that calls the vanilla class's ``method`` on the raw parameters.

    Otherwise ``reset_parameters`` would initialize a computed tensor, without effect.
    """

    def reset(self: ExcitedLayer) -> None:
        getattr(raw_view(self), method)()

    reset.__doc__ = "Initializes the raw weights as the vanilla class would; excitations are kept."
    return reset


def _vanilla_initializer(base: Any) -> Callable[..., None]:
    """An ``__init__`` that makes a vanilla ``base``.

    Only a layer's own methods call it, as ``self.__class__(...)``: conversion, copies and pickles
    do not.
    """

    @functools.wraps(base.__init__)
    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        self.__class__ = base
        self.__init__(*args, **kwargs)

    return initialize


def _overrides(base: Any, parameters: tuple[str, ...]) -> dict[str, Any]:
    """The attributes of the excited class of ``base``."""
    found: dict[str, Any] = {name: excited_property(name) for name in parameters}
    for method in ("reset_parameters", "_reset_parameters"):
        if hasattr(base, method):
            found[method] = _raw_initializer(method)
    return found | {
        "__init__": _vanilla_initializer(base),
        "vanilla_class": base,
        "excited_parameters": parameters,
        "__module__": PUBLIC_PATH,
        "__doc__": f"A ``{base.__name__}`` with excited {', '.join(parameters)}.",
    }


_WITH_NAMES_OF_THEIR_OWN = {f"WE{base.__name__}": base for base in (*CONV_KINDS, nn.Linear)}
"""Vanilla classes whose excited ones pickle as ``WEConv2d``; others get a describing name."""


@functools.cache  # one class for one question, so that copies and pickles agree on it
def excited_class(base: Any, parameters: tuple[str, ...]) -> type[ExcitedLayer]:
    """The excited class of ``base`` for these ``parameters``; always the same object."""
    name = f"WE{base.__name__}"
    made = type(name, (ExcitedLayer, base), _overrides(base, parameters))
    if parameters != ("weight",) or _WITH_NAMES_OF_THEIR_OWN.get(name) is not base:
        made.__qualname__ = MadeClass.of(base, parameters).name
    return made


def find_excited_class(name: str) -> type[ExcitedLayer] | None:
    """The excited class that pickles call ``name``, or None."""
    if name in _WITH_NAMES_OF_THEIR_OWN:
        return excited_class(_WITH_NAMES_OF_THEIR_OWN[name], ("weight",))
    made = MadeClass.parse(name)
    if made is None:
        return None
    base: Any = importlib.import_module(made.module)
    for part in made.classes:
        base = getattr(base, part)
    return excited_class(base, made.parameters)
