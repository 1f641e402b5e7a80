"""Train any PyTorch model with weight excitation, and deploy the vanilla architecture."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from we_surgery._util.version import __version__ as __version__

__all__ = [
    "EXCITATIONS",
    "MODES",
    "TRANSPLANTS",
    "AlreadyConvertedWarning",
    "Architecture",
    "AttachedExcitation",
    "AttachmentError",
    "Decision",
    "Excitation",
    "ExcitationError",
    "InputError",
    "LoadedKeys",
    "Mode",
    "NotStrippedWarning",
    "NothingToConvertWarning",
    "NothingToStripWarning",
    "PartialLoadWarning",
    "Plan",
    "Policy",
    "Rule",
    "ShiftAttentionSchedule",
    "StaleOptimizerWarning",
    "StripReport",
    "SurgeryError",
    "ThawedLayerWarning",
    "Transplant",
    "WESchedule",
    "WESurgeryError",
    "WeightLayout",
    "add_to_optimizer",
    "attach",
    "average_location_nets",
    "cached",
    "convert",
    "harden",
    "load",
    "load_vanilla",
    "make_policy",
    "norm_loss",
    "param_groups",
    "plan",
    "project",
    "register_excitation",
    "remove_from_optimizer",
    "resume",
    "save",
    "shift_attention_words",
    "sparsity_loss",
    "strip",
    "strip_sharded",
    "strip_state_dict",
    "strip_with_report",
]

if TYPE_CHECKING:
    from we_surgery.api import *
else:

    def __getattr__(name: str) -> Any:
        """A public name, or a module of the package, imported when it is first used.

        So the command line parses, helps and completes without importing torch.
        """
        if name in __all__:
            value = getattr(import_module("we_surgery.api"), name)
            globals()[name] = value
            return value
        module = f"{__name__}.{name}"
        if not name.startswith("_"):
            try:
                return import_module(module)
            except ModuleNotFoundError as error:
                if error.name != module:
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
