"""Makes docs/methods.md: every method of the papers, what gives it, and what its authors found.

The listing comes from the registries, the systems from docs/methods.yaml, the added parameters
from plans on the meta device::

    python benchmarks/methods.py            # writes docs/methods.md
    python benchmarks/methods.py --check    # exit 1 if it is out of date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import yaml
from torch import nn

import we_surgery as ws
from we_surgery.jobs.methods import Method, family

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "methods.md"
ROWS = ROOT / "docs" / "methods.yaml"
NETWORKS = ("torchvision:resnet18", "torchvision:resnet50")

HEAD = """\
# Methods

Made by `python benchmarks/methods.py` from the registries and `docs/methods.yaml`. The published
figures are those of the cited authors; this repository has not reproduced them. The columns
ResNet18 and ResNet50 count the parameters that training adds to torchvision's networks. Strip
removes those of excitations, and keeps those of transplants that stay in the model. "Both" forms
are [attached](how_attach_works.md) and [converted](converting.md).
"""


def page() -> str:
    """The whole page."""
    systems = yaml.safe_load(ROWS.read_text(encoding="utf-8"))
    parts = [HEAD, "## The family\n", listing(family())]
    for section in systems:
        parts += [f"\n## {section['section']}\n", table(section["rows"])]
    return "\n".join(parts)


def listing(methods: Sequence[Method]) -> str:
    """What `we-convert --list-modes` lists, as a table."""
    lines = [
        "| name | kind | form | what it does | options | source |",
        "|---|---|---|---|---|---|",
    ]
    for method in methods:
        options = ", ".join(f"{key}: {_shown(value)}" for key, value in method.options.items())
        cells = (
            f"`{method.name}`",
            method.kind,
            method.forms,
            method.summary,
            options,
            method.source,
        )
        lines.append(_row(cells))
    return "\n".join(lines)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One section's systems."""
    lines = [
        "| system | source | what gives it | form | ResNet18 | ResNet50 | after strip | "
        "published |",
        "|---|---|---|---|--:|--:|---|---|",
    ]
    for row in rows:
        added = ["-", "-"] if "network" in row or "config" not in row else list(_added(row))
        cells = (row["system"], row["source"], _config_text(row), _form(row), *added, _after(row))
        lines.append(_row((*cells, row["published"])))
    return "\n".join(lines)


def _config_text(row: Mapping[str, Any]) -> str:
    config = row.get("config")
    if config is None:
        text = row["instead"]
    elif isinstance(config, str):
        text = f"[{config}](../configs/{config})"
    elif list(config) == ["mode"]:
        text = f"`mode: {config['mode']}`"
    else:
        text = f"`{yaml.safe_dump(config, default_flow_style=True, width=1000).strip()}`"
    if "run" in row:
        text += f"; trained by [{Path(row['run']).stem}](../configs/recipes/{row['run']})"
    return text


def _added(row: Mapping[str, Any]) -> Iterator[str]:
    for network in NETWORKS:
        yield f"{_plan(row, network).added_parameters:,}"


def _form(row: Mapping[str, Any]) -> str:
    """The forms that train a row's system, where it says nothing else."""
    if "config" not in row or "form" in row:
        return str(row.get("form", "-"))
    plan = _plan(row, row.get("network", NETWORKS[1]))
    found = [ws.EXCITATIONS[stage].forms for each in plan.excited for stage in each.stages]
    found += [decision.method.forms for decision in plan.transplants if decision.attach]
    special = [forms for forms in found if forms != ws.Excitation.forms]
    return "; ".join(dict.fromkeys(special or found))


def _after(row: Mapping[str, Any]) -> str:
    if "after" in row:
        return str(row["after"])
    plan = _plan(row, row.get("network", NETWORKS[1]))
    stages = [stage for decision in plan.excited for stage in decision.stages]
    forms = [ws.EXCITATIONS[stage].deploys_to for stage in stages]
    forms += [decision.method.deploys_to for decision in plan.transplants if decision.attach]
    # The most particular is the last stage's: what it makes is what is folded.
    special = [form for form in forms if form != ws.Excitation.deploys_to]
    return "; ".join(dict.fromkeys(special or forms))


def _plan(row: Mapping[str, Any], network: str) -> ws.Plan:
    config = row["config"]
    if isinstance(config, str):
        config = ROOT / "we_surgery" / "configs" / config
    return ws.plan(_build(network), config=config)


@cache
def _build(network: str) -> nn.Module:
    library, _, name = network.partition(":")
    with torch.device("meta"):
        if library == "timm":
            return timm.create_model(name)
        return torchvision.models.get_model(name)


def _shown(value: Any) -> str:
    return f"`{yaml.safe_dump(value, default_flow_style=True).strip().removesuffix('...').strip()}`"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if it differs")
    made = page() + "\n"
    if not parser.parse_args().check:
        PAGE.write_text(made, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made:
        sys.exit(f"{PAGE} is out of date: run `python benchmarks/methods.py`")


if __name__ == "__main__":
    main()
