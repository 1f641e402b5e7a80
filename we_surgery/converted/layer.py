"""The excited layer: an ordinary layer whose ``weight`` is computed from a raw weight.

A layer is excited by swapping its class, in place, for a subclass with a
read-only ``weight`` property over a parameter called ``raw_weight``. Whoever
reads ``layer.weight``, the layer's own forward or a parent that feeds it to a
fused kernel, gets the excited weight, and a converted checkpoint is refused by
a vanilla model instead of being loaded with the wrong meaning.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from we_surgery.converted.fresh_layers import item_or_slice, vanilla_initializer
from we_surgery.converted.own_state import has_own_state, load_raw, save_raw
from we_surgery.converted.views import drop_own_attributes, folded_parameters, vanilla_view
from we_surgery.converted.weight_readers import REPLACING, refuse_offloaded, refused
from we_surgery.errors import ExcitationError, InputError
from we_surgery.excitations import Composition
from we_surgery.excitations.names import MadeClass, excitation_name, raw_name

_FUNCTIONAL_CALL = "torch.nn.utils._named_member_accessor"
"""The module of torch that puts the tensors of a functional call into layers."""

if TYPE_CHECKING:
    _ModuleBase = nn.Module
else:
    # Not nn.Module: the mixin must come before the vanilla class and leave its layout alone.
    _ModuleBase = object


class ExcitedLayer(_ModuleBase):
    """What all excited layers add to their vanilla class.

    Attributes:
        vanilla_class: the class the layer had and gets back.
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

    def __delattr__(self, name: str) -> None:
        base: Any = self.vanilla_class
        excited = self.excited_parameters
        if name not in excited or type(self) is not excited_class(base, excited):
            super().__delattr__(name)
            return
        # As of a vanilla layer; `ParameterDict.pop` does it.
        del self._parameters[raw_name(name)], self._modules[excitation_name(name)]
        left = tuple(other for other in excited if other != name)
        self.__class__ = excited_class(base, left) if left else base
        if not left:
            drop_own_attributes(self)

    def fuse(self) -> nn.Module:
        """A vanilla layer with the excited weight folded in; this layer is left as it is.

        The name is the one timm's ``reparameterize_model`` looks for.
        """
        folded = folded_parameters(self)
        memo: dict[int, Any] = {id(parameter): parameter for parameter in folded.values()}
        fused = copy.deepcopy(vanilla_view(self, folded), memo)
        # timm does not look inside what a `fuse` returns, such as an attention layer's out_proj.
        for name, layer in list(excited_layers(fused)):
            fused.set_submodule(name, layer.fuse())
        return fused

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        vanilla: list[str] = []

        def rename(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
            for name in self.excited_parameters:
                vanilla_key, raw_key = prefix + name, prefix + raw_name(name)
                if vanilla_key in state_dict and raw_key not in state_dict:
                    vanilla.append(name)
                    # A vanilla checkpoint: its weight becomes the raw weight, as if it had been
                    # loaded before the conversion, and the excitation keeps its values but those
                    # that it takes from the weight.
                    state_dict[raw_key] = state_dict.pop(vanilla_key)
                    excitation = getattr(self, excitation_name(name))
                    own = excitation.state_dict(prefix=f"{prefix}{excitation_name(name)}.")
                    for key, value in own.items():
                        state_dict.setdefault(key, value)

        # The last of the hooks: the layer's own know vanilla names.
        with self.register_load_state_dict_pre_hook(rename):  # type: ignore[no-untyped-call]
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in vanilla:
            getattr(self, excitation_name(name)).prepare(getattr(self, raw_name(name)))


def excited_property(parameter: str) -> property:
    """A property that computes ``parameter`` by its excitation each time it is read."""
    raw, excitation = raw_name(parameter), excitation_name(parameter)

    def read(self: ExcitedLayer) -> Tensor:
        if not torch.compiler.is_compiling():
            reader = sys._getframe(1).f_globals.get("__name__", "")
            if reader in REPLACING:
                raise refused(reader, describe(self), parameter)
        try:
            # nn.Module.__getattr__ takes ten times as long. The raw weight is asked of it all the
            # same: torch.fx puts a proxy there while it traces.
            own: Any = self._modules.get(excitation)
            if own is None:
                own = getattr(self, excitation)
            return own(getattr(self, raw))  # type: ignore[no-any-return]
        except AttributeError as error:
            # Left as it is, it would send Python on to nn.Module.__getattr__, which denies
            # that there is a `weight` and hides the cause.
            raise ExcitationError(
                f"the excited {parameter} of layer {describe(self)} cannot be computed: {error}",
                f"Its {raw!r} or {excitation!r} was removed or replaced; convert the model again.",
            ) from error
        except Exception as error:
            refuse_offloaded(describe(self), parameter, getattr(self, raw), own, error)
            error.add_note(f"while computing the excited {parameter} of layer {describe(self)}")
            raise

    return property(read, doc=f"The excited {parameter}; its raw values are in `{raw}`.")


def raw_initializer(method: str) -> Callable[[ExcitedLayer], None]:
    """A method that calls the vanilla class's ``method`` on the raw parameters.

    Left as it is, ``reset_parameters`` would initialize a computed tensor, to no effect.
    """

    def reset(self: ExcitedLayer) -> None:
        raw = {name: getattr(self, raw_name(name)) for name in self.excited_parameters}
        getattr(vanilla_view(self, raw), method)()

    reset.__doc__ = "Initializes the raw weights as the vanilla class would; excitations are kept."
    return reset


def assign_excited(layer: ExcitedLayer, name: str, value: Any) -> None:
    """``layer.weight = value``: stores the raw weight whose excitation is ``value``.

    Raises:
        ExcitationError: the excitation has no inverse in closed form.
        InputError: ``value`` is not a tensor of the weight's shape, or is to be put in and
            taken out again by ``torch.func.functional_call``.
    """
    if sys._getframe(2).f_globals.get("__name__") == _FUNCTIONAL_CALL:
        # The raw weight would take a copy, without a gradient, and not get its own value back.
        raise InputError(
            f"functional_call was given {name!r} of layer {describe(layer)}, which is computed",
            f"Give it {raw_name(name)!r} and the excitation's tensors, by the names that "
            "`model.named_parameters()` has for them.",
        )
    raw: Tensor = getattr(layer, raw_name(name))
    if not isinstance(value, Tensor) or value.shape != raw.shape:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            f"{name} of layer {describe(layer)} takes a tensor of shape {tuple(raw.shape)}, "
            f"not {found}",
            "Assign a tensor of that shape, or strip the model before changing its layers.",
        )
    try:
        with torch.no_grad():
            inverse = getattr(layer, excitation_name(name)).right_inverse(value.to(raw))
    except NotImplementedError as error:
        raise ExcitationError(
            f"{name} of layer {describe(layer)} is computed by "
            f"{describe_stages(getattr(layer, excitation_name(name)))} and cannot be assigned: "
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


def excited_names(module: nn.Module) -> tuple[str, ...]:
    """The parameters of ``module`` that are excited; none for a vanilla module."""
    return module.excited_parameters if isinstance(module, ExcitedLayer) else ()


def describe(layer: ExcitedLayer) -> str:
    """The layer's name and class, for messages."""
    return f"{layer.layer_name!r} ({layer.vanilla_class.__name__})"


def describe_stages(excitation: Composition) -> str:
    """The stages' names joined as in a config: ``standardize+lwe``."""
    return "+".join(stage.name for stage in excitation.stages)


# Classes. Those of torch's own layers are written out; any other is made on demand and found
# again by pickle through this module's __getattr__, under a name that says what it is made of.


class WEConv1d(ExcitedLayer, nn.Conv1d):
    """A ``Conv1d`` with an excited weight."""


class WEConv2d(ExcitedLayer, nn.Conv2d):
    """A ``Conv2d`` with an excited weight."""


class WEConv3d(ExcitedLayer, nn.Conv3d):
    """A ``Conv3d`` with an excited weight."""


class WEConvTranspose1d(ExcitedLayer, nn.ConvTranspose1d):
    """A ``ConvTranspose1d`` with an excited weight."""


class WEConvTranspose2d(ExcitedLayer, nn.ConvTranspose2d):
    """A ``ConvTranspose2d`` with an excited weight."""


class WEConvTranspose3d(ExcitedLayer, nn.ConvTranspose3d):
    """A ``ConvTranspose3d`` with an excited weight."""


class WELinear(ExcitedLayer, nn.Linear):
    """A ``Linear`` with an excited weight."""


_WRITTEN_OUT: dict[type[nn.Module], type[ExcitedLayer]] = {
    nn.Conv1d: WEConv1d,
    nn.Conv2d: WEConv2d,
    nn.Conv3d: WEConv3d,
    nn.ConvTranspose1d: WEConvTranspose1d,
    nn.ConvTranspose2d: WEConvTranspose2d,
    nn.ConvTranspose3d: WEConvTranspose3d,
    nn.Linear: WELinear,
}
for _vanilla, _excited in _WRITTEN_OUT.items():
    _excited.vanilla_class = _vanilla
    _excited.excited_parameters = ("weight",)
    setattr(_excited, "weight", excited_property("weight"))  # noqa: B010
    setattr(_excited, "reset_parameters", raw_initializer("reset_parameters"))  # noqa: B010
    setattr(_excited, "__init__", vanilla_initializer(_vanilla))  # noqa: B010


@cache  # one class for one question, so that copies and pickles agree on it
def excited_class(base: Any, parameters: tuple[str, ...]) -> type[ExcitedLayer]:
    """The class of a ``base`` layer whose ``parameters`` are excited; always the same object."""
    if parameters == ("weight",) and base in _WRITTEN_OUT:
        return _WRITTEN_OUT[base]
    namespace: dict[str, Any] = {name: excited_property(name) for name in parameters}
    for method in ("reset_parameters", "_reset_parameters"):
        if hasattr(base, method):
            namespace[method] = raw_initializer(method)
    if has_own_state(base):
        namespace |= {"_save_to_state_dict": save_raw, "_load_from_state_dict": load_raw}
    if issubclass(base, nn.ParameterList):
        namespace["__getitem__"] = item_or_slice(base)
    namespace |= {
        "__init__": vanilla_initializer(base),
        "vanilla_class": base,
        "excited_parameters": parameters,
        "__module__": __name__,
        "__doc__": f"A ``{base.__name__}`` with excited {', '.join(parameters)}.",
    }
    made = type(f"WE{base.__name__}", (ExcitedLayer, base), namespace)
    made.__qualname__ = MadeClass.of(base, parameters).name
    return made


def __getattr__(name: str) -> Any:
    """Finds a class made by :func:`excited_class` in another process, for pickle."""
    made = MadeClass.parse(name)
    if made is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base: Any = importlib.import_module(made.module)
    for part in made.classes:
        base = getattr(base, part)
    return excited_class(base, made.parameters)
