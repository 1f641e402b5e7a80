"""State dicts as they were before they had records."""

import torch
from torch import Tensor

from we_surgery.excitations.record import is_record, read_record


def in_old_form(state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The state dict with the buffers that stood for options, in the place of its records."""
    old: dict[str, Tensor] = {}
    for key, value in state.items():
        if is_record(key):
            prefix = key.removesuffix("_extra_state")
            old |= {prefix + name: mark for name, mark in _marks(read_record(value), dtype).items()}
        else:
            old[key] = value
    return old


def _marks(record: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    marks: dict[str, Tensor] = {}
    yes = torch.tensor(True)
    if record["transposed_groups"] is not None:
        marks["transposed_groups"] = torch.zeros(record["transposed_groups"], dtype=torch.uint8)
    if record["paused"]:
        marks["paused"] = torch.zeros(1, dtype=torch.uint8)
    for stage in record["stages"]:
        for name, options in stage.items():
            if "epsilon" in options and options.get("learn") != "epsilon":
                marks[f"{name}.epsilon"] = torch.tensor(options["epsilon"], dtype=dtype)
            if options.get("detach_max") is False:
                marks[f"{name}.undetached_max"] = yes
            if options.get("rescale") is False:
                marks[f"{name}.rescale_off"] = yes
            if options.get("averaged"):
                marks[f"{name}.net_averaged"] = yes
            if "skip" in options and options["skip"] != (options["attention"] == "bam"):
                marks[f"{name}.skip_{'on' if options['skip'] else 'off'}"] = yes
            if "hardening" in options:
                length = ("soft", "argmax", "round").index(options["hardening"])
                marks[f"{name}.hardened"] = torch.zeros(length, dtype=torch.uint8)
            for option, default in (
                ("attention", "se"),
                ("activation", "relu"),
                ("gate", "sigmoid"),
                ("resize", "linear"),
                ("curve", "atanh"),
            ):
                if options.get(option, default) != default:
                    marks[f"{name}.{option}_{options[option]}"] = yes
    return marks
