"""Plans, configs, options and places that do not fit: each the arguments of a failing command."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from toys import ConvNet

import we_surgery as ws

Usage = Callable[[Path], list[str]]
MODEL = "model.pt"
STATE = "state.pt"
CONVERTED = "converted.pt"


@functools.cache
def plan() -> dict[str, Any]:
    return json.loads(ws.plan(ConvNet(), "lwe").to_json())


def rows(change: Callable[[dict[str, Any]], Any]) -> Usage:
    """A plan with its first row changed."""

    def edit(data: dict[str, Any]) -> None:
        change(data["layers"][0])

    return edited(edit)


def edited(change: Callable[[dict[str, Any]], Any]) -> Usage:
    def make(folder: Path) -> list[str]:
        data = copy.deepcopy(plan())
        change(data)
        assert data != plan()
        return with_text("--plan", json.dumps(data))(folder)

    return make


def with_text(option: str, content: str | bytes) -> Usage:
    def make(folder: Path) -> list[str]:
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / "given").write_bytes(raw)
        return ["convert", MODEL, option, "given"]

    return make


def set_row(key: str, value: Any) -> Usage:
    return rows(lambda row: row.__setitem__(key, value))


def twice(data: dict[str, Any]) -> None:
    found = data["layers"]
    found.append(copy.deepcopy(found[0]))


PLANS: dict[str, Usage] = {
    "a layer that is not there": set_row("module", "nowhere"),
    "a layer of no name": set_row("module", ""),
    "a layer that is a number": set_row("module", 3),
    "a parameter that is not there": set_row("parameter", "mass"),
    "a parameter that is a method": set_row("parameter", "forward"),
    "another shape": set_row("shape", [1, 2, 3]),
    "a negative shape": set_row("shape", [-8, 3, 3, 3]),
    "a shape that is text": set_row("shape", "8x3"),
    "other groups": set_row("groups", 7),
    "another kind": set_row("kind", "conv9d"),
    "an unknown stage": set_row("excitation", [{"quantum": {}}]),
    "a stage twice": set_row("excitation", [{"lwe": {}}, {"lwe": {}}]),
    "a stage that is text": set_row("excitation", "lwe"),
    "options that are unknown": set_row("excitation", [{"lwe": {"evil": 1}}]),
    "options that are text": set_row("excitation", [{"mwe": {"epsilon": "x"}}]),
    "a negative epsilon": set_row("excitation", [{"mwe": {"epsilon": -1.0}}]),
    "an epsilon that is not a number": set_row("excitation", [{"mwe": {"epsilon": float("nan")}}]),
    "two stages in one": set_row("excitation", [{"lwe": {}, "mwe": {}}]),
    "an unknown field": set_row("evil", 1),
    "a row twice": edited(twice),
    "a newer schema": edited(lambda data: data.__setitem__("schema", 99)),
    "an unknown key": edited(lambda data: data.__setitem__("evil", 1)),
    "rows that are text": edited(lambda data: data.__setitem__("layers", "x")),
    "no JSON": with_text("--plan", "{not json"),
    "no text": with_text("--plan", b"\xff\xfe\x00"),
    "nothing": with_text("--plan", ""),
    "a list": with_text("--plan", "[]"),
    "null": with_text("--plan", "null"),
    "nested lists": with_text("--plan", "[" * 50_000),
    "a number of many digits": with_text("--plan", '{"schema": ' + "9" * 10_000 + "}"),
    "a folder": lambda folder: ["convert", MODEL, "--plan", "."],
    "no file": lambda folder: ["convert", MODEL, "--plan", "nowhere.json"],
}

LAUGHS = "a: &a0 [x]\n" + "".join(f"b{i}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40))
CONFIGS: dict[str, Usage] = {
    "a call": with_text("--config", "!!python/object/apply:os.system ['touch canary']"),
    "a module": with_text("--config", "!!python/module:os"),
    "a name": with_text("--config", "mode: !!python/name:os.system"),
    "an object": with_text("--config", "!!python/object/new:os.system ['touch canary']"),
    "two to the fortieth": with_text("--config", LAUGHS),
    "two to the fortieth for a mode": with_text("--config", LAUGHS + "mode: *a40\n"),
    "a rule of two to the fortieth": with_text("--config", LAUGHS + "rules: *a40\n"),
    "itself": with_text("--config", "&a {mode: *a}"),
    "an unknown key": with_text("--config", "evil: 1"),
    "an unknown mode": with_text("--config", "mode: evil"),
    "a mode that is a list": with_text("--config", "mode: [lwe]"),
    "text": with_text("--config", "lwe"),
    "a list": with_text("--config", "- lwe"),
    "a number": with_text("--config", "3"),
    "keys that are numbers": with_text("--config", "1: 2"),
    "keys that are lists": with_text("--config", "[a]: 2"),
    "tabs": with_text("--config", "mode:\tlwe\n\tx: y"),
    "no text": with_text("--config", b"\xff\xfe\x00\x01"),
    "a control character": with_text("--config", b"mode: \x07"),
    "nested lists": with_text("--config", "[" * 3_000),
    "rules that are text": with_text("--config", "rules: all"),
    "a rule without a match": with_text("--config", "rules: [{excite: lwe}]"),
    "a rule with a broken expression": with_text(
        "--config", "rules: [{match: 're:(', excite: mwe}]"
    ),
    "a folder": lambda folder: ["convert", MODEL, "--config", "."],
    "no file": lambda folder: ["convert", MODEL, "--config", "nowhere.yaml"],
}


def arguments(*words: str) -> Usage:
    return lambda folder: list(words)


OPTIONS: dict[str, Usage] = {
    "no such file": arguments("convert", "nowhere.pt"),
    "a folder": arguments("convert", "."),
    "the root": arguments("inspect", "/"),
    "no name": arguments("inspect", ""),
    "a name of 5,000 letters": arguments("inspect", "a" * 5000),
    "a name that is no text": arguments("inspect", "a\udcff"),
    "a name in a picture's words": arguments("inspect", "[/red][bold]x.pt"),
    "an address": arguments("inspect", "https://example.org/model.pt"),
    "an unknown architecture": arguments("convert", "torchvision:resnet51"),
    "a factory that is not there": arguments("convert", "toys:Nothing"),
    "a factory that is no function": arguments("convert", "toys:ZOO_INPUT"),
    "a factory that returns text": arguments("inspect", "os:getcwd"),
    "a factory of no module": arguments("convert", "nowhere_at_all:build"),
    "an argument without a value": arguments("convert", "toys:ConvNet", "--arch-arg", "x"),
    "an argument that is unknown": arguments("convert", "toys:ConvNet", "--arch-arg", "x=1"),
    "an argument that is no YAML": arguments("convert", "toys:ConvNet", "--arch-arg", "x=[1"),
    "an argument that calls": arguments(
        "convert", "toys:ConvNet", "--arch-arg", "x=!!python/object/apply:os.system [touch canary]"
    ),
    "a key for a module": arguments("inspect", MODEL, "--key", "ema"),
    "a key that is not there": arguments("inspect", STATE, "--key", "ema"),
    "weights without an architecture": arguments("convert", STATE),
    "weights of another architecture": arguments("convert", STATE, "--arch", "toys:Zoo"),
    "a shape of letters": arguments("convert", MODEL, "--input-shape", "a,b"),
    "a shape of nothing": arguments("convert", MODEL, "--input-shape", ""),
    "a shape of zero": arguments("convert", MODEL, "--input-shape", "1,0,8,8"),
    "a negative shape": arguments("convert", MODEL, "--input-shape", "1,-3,8,8"),
    "a shape that does not fit": arguments("convert", MODEL, "--input-shape", "1,4,8,8"),
    "a shape of few dimensions": arguments("convert", MODEL, "--input-shape", "3"),
    "a shape beyond memory": arguments("convert", MODEL, "--input-shape", "1,3,10000000,10000000"),
    "a shape beyond 64 bits": arguments("convert", MODEL, "--input-shape", "1,3,1" + "0" * 20),
    "strip with a shape that does not fit": arguments(
        "strip", CONVERTED, "--input-shape", "1,4,8,8"
    ),
    "strip with a shape beyond memory": arguments(
        "strip", CONVERTED, "--input-shape", "1,3,10000000,10000000"
    ),
    "a folder as output of one file": arguments("convert", MODEL, "-o", "new/"),
    "an output without a name": arguments("convert", MODEL, "-o", ""),
    "a rule without stages": arguments("convert", MODEL, "--rule", "stem"),
    "a rule with unknown stages": arguments("convert", MODEL, "--rule", "stem=evil"),
    "a rule that matches nothing": arguments("convert", MODEL, "--rule", "nowhere=lwe"),
    "a rule with a broken expression": arguments("convert", MODEL, "--rule", "re:(=lwe"),
    "everything skipped": arguments("convert", MODEL, "--skip", "*"),
    "convert twice": arguments("convert", CONVERTED),
    "strip of a vanilla model": arguments("strip", MODEL),
    "strip of vanilla weights": arguments("strip", STATE),
    "the input as the output": arguments("convert", MODEL, "-o", MODEL),
    "the input by another name": arguments("convert", MODEL, "-o", f"./{MODEL}"),
    "an output that exists": arguments("convert", MODEL, "-o", STATE),
    "an output in no folder": arguments("convert", MODEL, "-o", "nowhere/out.pt"),
    "an output in a file": arguments("convert", MODEL, "-o", f"{STATE}/out.pt"),
    "a folder for an output": arguments("convert", MODEL, "-o", ".", "--force"),
    "no name for an output": arguments("convert", MODEL, "-o", ""),
    "an output of 300 letters": arguments("convert", MODEL, "-o", "a" * 300),
    "a device for an output": arguments("convert", MODEL, "-o", "/dev/null", "--force"),
    "an output that cannot be made": arguments("convert", MODEL, "-o", "/proc/out.pt"),
    "an output of another kind": arguments("convert", MODEL, "--to", "safetensors", "-o", "a.pt"),
    "a package that is not there": arguments("inspect", STATE, "--allow", "../evil", "--key", "x"),
}


def place(make: Callable[[Path], object], name: str, *more: str) -> Usage:
    def build(folder: Path) -> list[str]:
        make(folder / name)
        return ["inspect", name, *more]

    return build


def dangling_output(folder: Path) -> list[str]:
    (folder / "out.pt").symlink_to("nowhere.pt")
    return ["convert", MODEL, "-o", "out.pt"]


def output_at_a_link(folder: Path) -> list[str]:
    (folder / "out.pt").symlink_to(STATE)
    return ["convert", MODEL, "-o", "out.pt"]


def ring(path: Path) -> None:
    path.symlink_to("other.pt")
    path.with_name("other.pt").symlink_to(path.name)


def folder_that_is_closed(folder: Path) -> list[str]:
    (folder / "closed").mkdir(mode=0o500)
    return ["convert", MODEL, "-o", "closed/out.pt"]


def file_that_is_closed(path: Path) -> None:
    path.write_bytes(b"x")
    path.chmod(0)


PLACES: dict[str, Usage] = {
    "a pipe": place(os.mkfifo, "pipe.pt"),
    "a link to nothing": place(lambda path: path.symlink_to("nowhere.pt"), "link.pt"),
    "a link to itself": place(lambda path: path.symlink_to(path.name), "link.pt"),
    "a ring of links": place(ring, "link.pt"),
    "a link to a folder": place(lambda path: path.symlink_to("."), "link.pt"),
    "a link to a device": place(lambda path: path.symlink_to("/dev/zero"), "link.pt"),
    "a device": arguments("inspect", "/dev/zero"),
    "a device of nothing": arguments("inspect", "/dev/null"),
    "memory": arguments("inspect", "/proc/self/mem"),
    "an empty folder": place(Path.mkdir, "folder.pt"),
    "an output at a link to nothing": dangling_output,
    "an output at a link": output_at_a_link,
}
# Root may read and write anything.
PLACES_OF_A_USER: dict[str, Usage] = {
    "an output in a closed folder": folder_that_is_closed,
    "a closed file": place(file_that_is_closed, "closed.pt"),
}


def prepare(folder: Path) -> None:
    """Files that the cases need."""
    torch.manual_seed(0)
    model = ConvNet()
    torch.save(model, folder / MODEL)
    torch.save(model.state_dict(), folder / STATE)
    torch.save(ws.convert(model, "lwe"), folder / CONVERTED)


def cases() -> dict[str, Usage]:
    groups = {"plan": PLANS, "config": CONFIGS, "option": OPTIONS, "place": PLACES}
    if os.geteuid() != 0:
        groups["user"] = PLACES_OF_A_USER
    return {f"{group}: {key}": v for group, found in groups.items() for key, v in found.items()}
