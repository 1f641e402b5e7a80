"""Every method of the registry as lists of stages, for the tests that each of them has to pass.

A new line of the registry is here by itself, in its defaults; its further forms are added below.
"""

from typing import Any

import pytest

from we_surgery.excitations import EXCITATIONS, Stages, WeightLayout

FORMS: dict[str, list[dict[str, Any]]] = {
    "lwe": [
        {"skip": True, "gate": "tanh", "activation": "swish"},
        {"attention": "cbam", "reduction": 2},
        {"attention": "cbam", "skip": True, "activation": "leaky_relu"},
        {"attention": "bam", "reduction": 2},
        {"attention": "bam", "skip": False, "gate": "tanh"},
        {"attention": "triplet"},
        {"attention": "triplet", "skip": True},
        {"attention": "global"},
        {"attention": "global", "resize": "area", "averaged": True, "reduction": 8},
        {"attention": "cbam", "kernel": 7},
        {"attention": "triplet", "separate": True, "kernel": 7},
        {"attention": "direct"},
        {"attention": "direct", "rank": 2, "skip": True},
        {"attention": "position"},
        {"attention": "position", "hidden": 2, "skip": True, "inner": "lwe"},
        {"attention": "heads", "heads": 2},
        {"attention": "heads", "heads": 2, "layer": "proj", "gate": "tanh"},
        {"repeat": 3, "reduction": 4},
        {"attention": "global", "then": {"attention": "se", "reduction": 2}},
        {"attention": "cbam", "repeat": 2, "then": {"attention": "triplet", "repeat": 2}},
        {"inner": "lwe"},
        {"inner": "mwe"},
        {"inner": {"lwe": {"inner": "lwe+mwe", "skip": True}}},
    ],
    "mwe": [
        {"learn": "epsilon", "epsilon": 0.2},
        {"learn": "mix"},
        {"curve": "novel_log10", "rescale": False},
        {"curve": "tanh"},
        {"curve": "novel", "relative": False},
        {"maximum": "filter", "learn": "mix"},
        {"maximum": 0.9, "detach_max": False},
    ],
    "mwe_scheduled": [{"epsilon": 0.2, "final": 0.02, "steps": 3, "shape": "linear"}],
    "dynamic_sparse": [{"kernels": True}],
    "scaled_standardize": [{"gamma": 1.7}],
    "expand": [{"rate": 2}],
    "gain": [{"attention": "se"}],
    "weight_compander": [{"a": 3, "b": 1.5}, {"learn": False}],
    "lwe_gradient": [{"lwe": {"attention": "cbam", "reduction": 4}}],
    "shift_attention": [{"shared": True, "inverse_temperature": 0.15}],
}
OPTIONS = [(name, form) for name in EXCITATIONS for form in [{}, *FORMS.get(name, [])]]
STAGES: list[Stages] = [[{name: form}] for name, form in OPTIONS]

LAYOUTS = {
    "conv1d": WeightLayout((6, 8, 5)),
    "conv2d": WeightLayout((6, 8, 3, 3)),
    "even kernel": WeightLayout((6, 8, 2, 4)),
    "conv3d": WeightLayout((4, 6, 1, 3, 2)),
    "1x1": WeightLayout((6, 8, 1, 1)),
    "grouped": WeightLayout((6, 4, 3, 3), groups=2),
    "depthwise": WeightLayout((6, 1, 3, 3), groups=6),
    "one filter": WeightLayout((1, 4, 3, 3)),
    "linear": WeightLayout((6, 8)),
    "transposed": WeightLayout((8, 3, 3, 2), groups=2, transposed=True),
}


def name_of(stages: Stages) -> str:
    ((name, options),) = stages[0].items()
    return f"{name}({', '.join(f'{key}={value}' for key, value in options.items())})"


every_method = pytest.mark.parametrize("stages", STAGES, ids=name_of)


def on_layouts(*names: str) -> pytest.MarkDecorator:
    """Each method in its defaults on every layout, its further forms on the named ones."""
    cases = [
        pytest.param(stages, layout, id=f"{name_of(stages)}-{name}")
        for stages in STAGES
        for name, layout in LAYOUTS.items()
        if name in names or {} in stages[0].values()
    ]
    return pytest.mark.parametrize(("stages", "layout"), cases)


def fits(stages: Stages, layout: WeightLayout) -> bool:
    ((name, options),) = stages[0].items()
    return EXCITATIONS[name].unsupported_reason(layout, options) is None
