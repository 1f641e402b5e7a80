"""Pickles that call, archives that lie, files cut short: each a function that writes the file."""

from __future__ import annotations

import asyncio
import builtins
import bz2
import code
import ctypes
import functools
import gzip
import importlib
import io
import lzma
import marshal
import operator
import os
import pickle
import runpy
import shutil
import socket
import struct
import subprocess
import tarfile
import timeit
import types
import urllib.request
import warnings
import webbrowser
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

CANARY = "canary"
Maker = Callable[[Path], Path]
STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


PAYLOADS: dict[str, Any] = {
    "os.system": Calls(os.system, f"touch {CANARY}"),
    "os.popen": Calls(os.popen, f"touch {CANARY}"),
    "os.mkdir": Calls(os.mkdir, CANARY),
    "os.execl": Calls(os.execl, "/bin/touch", "touch", CANARY),
    "os.chmod": Calls(os.chmod, "attack.pt", 0),
    "subprocess": Calls(subprocess.check_call, ["touch", CANARY]),
    "Popen": Calls(subprocess.Popen, ["touch", CANARY]),
    "eval": Calls(eval, f"open({CANARY!r}, 'w')"),
    "exec": Calls(builtins.exec, f"open({CANARY!r}, 'w')"),
    "compile": Calls(builtins.compile, "1", "x", "eval"),
    "open": Calls(builtins.open, CANARY, "w"),
    "__import__": Calls(builtins.__import__, "antigravity"),
    "import_module": Calls(importlib.import_module, "this"),
    "getattr": Calls(builtins.getattr, 1, "real"),
    "setattr": Calls(builtins.setattr, nn.Linear, "forward", nn.Identity),
    "rmtree": Calls(shutil.rmtree, "."),
    "unlink": Calls(os.unlink, "attack.pt"),
    "touch": Calls(Path.touch, Path(CANARY)),
    "runpy": Calls(runpy.run_path, "attack.pt"),
    "ctypes": Calls(ctypes.CDLL, "libc.so.6"),
    "marshal": Calls(marshal.loads, marshal.dumps(compile("1", "x", "eval"))),
    "code.interact": Calls(code.InteractiveInterpreter),
    "timeit": Calls(timeit.timeit, f"open({CANARY!r}, 'w')"),
    "pickle.loads": Calls(pickle.loads, pickle.dumps(Calls(os.mkdir, CANARY))),
    "torch.load": Calls(torch.load, "other.pt"),
    "torch.hub": Calls(torch.hub.load, "owner/name", "model"),
    "torch.save": Calls(torch.save, 1, CANARY),
    "numpy.load": Calls(numpy.load, "x.npy", None, True),
    "numpy.fromfile": Calls(numpy.fromfile, "/etc/hostname", "u1"),
    "socket": Calls(socket.create_connection, ("127.0.0.1", 9)),
    "urlopen": Calls(urllib.request.urlopen, "http://127.0.0.1:9/"),
    "webbrowser": Calls(webbrowser.open, "http://127.0.0.1:9/"),
    "asyncio": Calls(asyncio.run, 1),
    "reduce": Calls(functools.reduce, operator.add, [1, 2]),
    "methodcaller": Calls(operator.methodcaller, "system", "true"),
    "attrgetter": Calls(operator.attrgetter("__class__.__mro__"), 1),
    "partial of system": functools.partial(os.system, f"touch {CANARY}"),
    "new_class": Calls(types.new_class, "X"),
    "a chain": Calls(Calls, Calls(Calls, Calls(os.mkdir, CANARY))),
    "a long chain": functools.reduce(
        lambda c, _: Calls(str, c), range(200), Calls(os.mkdir, CANARY)
    ),
}


def in_state_dict(payload: Any) -> Any:
    return {"state_dict": {**STATE, "more": payload}}


def in_checkpoint(payload: Any) -> Any:
    return {"state_dict": STATE, "optimizer": {"state": [payload]}}


def in_module(payload: Any) -> nn.Module:
    model = nn.Linear(2, 2)
    model.extra = payload
    return model


PLACES: dict[str, Callable[[Any], Any]] = {
    "bare": lambda payload: payload,
    "in a state dict": in_state_dict,
    "in a checkpoint": in_checkpoint,
    "in a module": in_module,
    "as a key": lambda payload: {**STATE, payload: 1},
}


def saved(content: Any, legacy: bool = False) -> Maker:
    def make(folder: Path) -> Path:
        path = folder / "attack.pt"
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        return path

    return make


def payload_cases() -> dict[str, Maker]:
    cases = {}
    places = list(PLACES)
    for index, (name, payload) in enumerate(PAYLOADS.items()):
        # Each alone, and in one of the other places; both formats by turns.
        for place in ("bare", places[1 + index % (len(places) - 1)]):
            legacy = index % 3 == 0
            cases[f"{name} {place}"] = saved(PLACES[place](payload), legacy)
    return cases


def archive(content: bytes, **records: bytes) -> Maker:
    def make(folder: Path) -> Path:
        path = folder / "attack.pt"
        with zipfile.ZipFile(path, "w") as file:
            for name, value in {
                "data.pkl": content,
                "byteorder": b"little",
                "version": b"3\n",
                **records,
            }.items():
                file.writestr(f"archive/{name}", value)
        return path

    return make


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def program(*instructions: bytes) -> bytes:
    return b"\x80\x02" + b"".join(instructions) + b"."


SYSTEM = name("posix", "system")
LINEAR = name("torch.nn.modules.linear", "Linear")

PROGRAMS = {
    "INST": b"\x80\x02(" + text("touch canary") + b"ios\nsystem\n.",
    "OBJ": b"\x80\x02(" + SYSTEM + text("touch canary") + b"o.",
    "STACK_GLOBAL": b"\x80\x02" + text("os") + text("system") + b"\x93.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "NEWOBJ_EX": program(LINEAR, b")}\x92"),
    "BYTEARRAY8": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".",
    "protocol 0": b"cos\nsystem\n(S'touch canary'\ntR.",
    "protocol 1": b"cos\nsystem\n(U\x0ctouch canarytR.",
    "protocol 3": b"\x80\x03" + SYSTEM + text("touch canary") + b"\x85R.",
    "protocol 4": pickle.dumps(Calls(os.mkdir, CANARY), 4),
    "protocol 5": pickle.dumps(Calls(os.mkdir, CANARY), 5),
    "protocol 99": b"\x80\x63N.",
    "a duplicated stack": program(SYSTEM, b"20", text("touch canary"), b"\x85R"),
    "a memo of the function": program(SYSTEM, b"q\x000h\x00", text("touch canary"), b"\x85R"),
    "a memo that is empty": program(b"h\x05"),
    "a missing mark": program(b"t"),
    "an empty stack": program(b"R"),
    "nothing": b"",
    "only a protocol": b"\x80\x02",
    "no end": b"\x80\x02}",
    "two ends": program(b"}") + program(SYSTEM, text("touch canary"), b"\x85R"),
    "a text of four gigabytes": b"\x80\x02X\xff\xff\xff\xffab.",
    "a number of 255 bytes cut": b"\x80\x02\x8a\xff1.",
    "text that is no text": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "a name that is no text": b"\x80\x02c\xff\xfe\nsystem\n.",
    "a dotted name": program(name("torch.nn.modules.linear", "Linear.__init__.__globals__")),
    "a name with a space": program(name("os ", "system")),
    "an empty name": program(name("", "")),
    "a private module": program(name("torch._C", "_load_for_lite_interpreter")),
    "a class by its old name": program(name("__builtin__", "eval"), text("1"), b"\x85R"),
    "a call of a layer": program(LINEAR, b"K\x02K\x03\x86R"),
    "arguments for a layer": program(LINEAR, b"K\x02K\x03\x86\x81"),
    "an item of a layer": program(
        name("torch.nn.modules.container", "ModuleDict"), b")\x81", text("a"), text("b"), b"s"
    ),
    "items of a layer": program(
        name("torch.nn.modules.container", "Sequential"), b")\x81(K\x00", LINEAR, b"u"
    ),
    "a state for a class": program(LINEAR, b"}", text("forward"), b"Nsb"),
    "a state for a number": program(b"K\x01}b"),
    "a class alone": program(LINEAR),
    "a layer without a state": program(LINEAR, b")\x81"),
    "a storage of no record": program(
        b"(", text("storage"), name("torch", "FloatStorage"), text("7"), text("cpu"), b"K\x04tQ"
    ),
    "a storage up the folders": program(
        b"(",
        text("storage"),
        name("torch", "FloatStorage"),
        text("../../../etc/hostname"),
        text("cpu"),
        b"K\x04tQ",
    ),
    "a storage of another sort": program(b"(", text("module"), LINEAR, text("x"), text("y"), b"tQ"),
    "a storage of 2**31 values": program(
        b"(",
        text("storage"),
        name("torch", "FloatStorage"),
        text("0"),
        text("cpu"),
        b"J\xff\xff\xff\x7ftQ",
    ),
    "a storage of -1 values": program(
        b"(",
        text("storage"),
        name("torch", "FloatStorage"),
        text("0"),
        text("cpu"),
        b"J\xff\xff\xff\xfftQ",
    ),
    "a thousand nested lists": program(b"]" * 1000, b"a" * 999),
    "a list in itself": program(b"]q\x00h\x00a"),
    "a mapping in itself": program(b"}q\x00", text("state_dict"), b"h\x00s"),
    "a bytearray of 2**31": program(name("builtins", "bytearray"), b"J\xff\xff\xff\x7f\x85R"),
    "a tensor of 2**31": program(name("torch", "Tensor"), b"J\xff\xff\xff\x7f\x85R"),
    "a storage of 2**31": program(
        name("torch.storage", "UntypedStorage"), b"J\xff\xff\xff\x7f\x85R"
    ),
}


def rewritten(change: Callable[[zipfile.ZipFile, zipfile.ZipFile], None]) -> Maker:
    """A sound archive written anew with a change."""

    def make(folder: Path) -> Path:
        buffer = io.BytesIO()
        torch.save(STATE, buffer)
        path = folder / "attack.pt"
        with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
            change(source, target)
        return path

    return make


def packed(method: int) -> Maker:
    def change(source: zipfile.ZipFile, target: zipfile.ZipFile) -> None:
        for record in source.namelist():
            content = source.read(record)
            if "/data/" in record:
                content = bytes(1 << 22)
            target.writestr(record, content, method)

    return rewritten(change)


def renamed(change: Callable[[str], str]) -> Maker:
    def write(source: zipfile.ZipFile, target: zipfile.ZipFile) -> None:
        for record in source.namelist():
            target.writestr(change(record), source.read(record))

    return rewritten(write)


def replaced(record: str, content: bytes) -> Maker:
    def change(source: zipfile.ZipFile, target: zipfile.ZipFile) -> None:
        for known in source.namelist():
            target.writestr(known, content if known.endswith(record) else source.read(known))

    return rewritten(change)


def patched(change: Callable[[bytearray], bytes | bytearray]) -> Maker:
    def make(folder: Path) -> Path:
        buffer = io.BytesIO()
        torch.save(STATE, buffer)
        path = folder / "attack.pt"
        path.write_bytes(change(bytearray(buffer.getvalue())))
        return path

    return make


def doubled(source: zipfile.ZipFile, target: zipfile.ZipFile) -> None:
    for record in source.namelist():
        target.writestr(record, source.read(record))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target.writestr("archive/data.pkl", PROGRAMS["protocol 4"])


def overlapping(content: bytearray) -> bytes:
    """Every record of the directory at the place of the first, each as long as the file."""
    start = content.rindex(b"PK\x01\x02", 0, content.index(b"PK\x01\x02") + 4)
    while (start := content.find(b"PK\x01\x02", start)) >= 0:
        content[start + 20 : start + 28] = struct.pack("<II", len(content), len(content))
        start += 4
    return content


def set_flag(content: bytearray) -> bytes:
    """Says that each record is encrypted."""
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = -1
        while (start := content.find(signature, start + 1)) >= 0:
            content[start + at] |= 1
    return content


ARCHIVES = {
    "packed by deflate": packed(zipfile.ZIP_DEFLATED),
    "packed by bzip2": packed(zipfile.ZIP_BZIP2),
    "packed by lzma": packed(zipfile.ZIP_LZMA),
    "two records of one name": rewritten(doubled),
    "records that overlap": patched(overlapping),
    "encrypted": patched(set_flag),
    "records outside": renamed(lambda record: f"../../{record}"),
    "records at the root": renamed(lambda record: f"/{record}"),
    "records of another system": renamed(lambda record: record.replace("/", "\\")),
    "records without a folder": renamed(lambda record: record.rpartition("/")[2]),
    "records in many folders": renamed(lambda record: f"{record.partition('/')[2]}/{record}"),
    "byte order of the middle": replaced("byteorder", b"middle"),
    "version of a far future": replaced("version", b"999999\n"),
    "version that is no number": replaced("version", b"\xff\xfe"),
    "no byte order": replaced("byteorder", b""),
    "an empty pickle": replaced("data.pkl", b""),
    "a program for a pickle": replaced("data.pkl", b"import os\nos.mkdir('canary')\n"),
    "a directory cut off": patched(lambda content: content[: content.index(b"PK\x01\x02")]),
    "no pickle": renamed(lambda record: record.replace("data.pkl", "data.json")),
    "TorchScript's constants": archive(PROGRAMS["nothing"], **{"constants.pkl": b""}),
}


def written(content: bytes, filename: str = "attack.pt") -> Maker:
    def make(folder: Path) -> Path:
        (folder / filename).write_bytes(content)
        return folder / filename

    return make


def in_tar(folder: Path) -> Path:
    inner = pickle.dumps(Calls(os.mkdir, CANARY), 2)
    with tarfile.open(folder / "attack.pt", "w") as file:
        for record in ("storages", "tensors", "pickle", "../../canary"):
            info = tarfile.TarInfo(record)
            info.size = len(inner)
            file.addfile(info, io.BytesIO(inner))
    return folder / "attack.pt"


def legacy_and_tar(folder: Path) -> Path:
    """torch.load takes it for a tar, by bytes that the pickle reads past."""
    path = in_tar(folder)
    legacy = io.BytesIO()
    torch.save(STATE, legacy, _use_new_zipfile_serialization=False)
    path.write_bytes(legacy.getvalue()[:100] + path.read_bytes()[100:])
    return path


ZIPPED = io.BytesIO()
torch.save(Calls(os.mkdir, CANARY), ZIPPED)
POLYGLOTS = {
    "a tar of an old torch": in_tar,
    "a pickle's start and a tar": legacy_and_tar,
    "safetensors and then a zip": written(safetensors_bytes(STATE) + ZIPPED.getvalue()),
    "a pickle and then a zip": written(PROGRAMS["protocol 4"] + ZIPPED.getvalue()),
    "a script and then a zip": written(b"#!/bin/sh\ntouch canary\n" + ZIPPED.getvalue()),
    "a picture and then a zip": written(b"\x89PNG\r\n\x1a\n" + ZIPPED.getvalue()),
    "a zip and then a pickle": written(ZIPPED.getvalue() + PROGRAMS["protocol 4"]),
    "a zip's start in a header's length": written(b"PK\x03\x04\x00\x00\x00\x00{}" + bytes(100)),
    "gzip": written(gzip.compress(ZIPPED.getvalue())),
    "bzip2": written(bz2.compress(ZIPPED.getvalue())),
    "xz": written(lzma.compress(ZIPPED.getvalue())),
    "joblib": written(b"ZF0x5" + bytes(60)),
    "numpy": written(b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False}" + bytes(99)),
    "HDF5": written(b"\x89HDF\r\n\x1a\n" + bytes(500)),
    "ONNX": written(b"\x08\x07\x12\x07pytorch" + bytes(99)),
    "ELF": written(b"\x7fELF" + bytes(500)),
    "HTML": written(b"<!DOCTYPE html><html><title>404</title></html>"),
    "JSON": written(b'{"state_dict": {}}'),
    "YAML": written(b"!!python/object/apply:os.system ['touch canary']\n"),
    "zeros": written(bytes(5000)),
    "ones": written(b"\xff" * 5000),
}


def truncation_cases(kilobytes: int = 24) -> dict[str, Maker]:
    cases = {}
    state = {f"layer{i}.weight": torch.full((512,), float(i)) for i in range(kilobytes // 2)}
    buffers = {"zip": io.BytesIO(), "legacy": io.BytesIO()}
    torch.save(state, buffers["zip"])
    torch.save(state, buffers["legacy"], _use_new_zipfile_serialization=False)
    contents = {kind: buffer.getvalue() for kind, buffer in buffers.items()}
    contents["safetensors"] = safetensors_bytes(state)
    for kind, content in contents.items():
        for length in range(0, len(content), 1024):
            cases[f"{kind} cut after {length // 1024} KiB"] = written(content[:length])
        for at in range(4):
            spoilt = content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]
            cases[f"{kind} with byte {at} wrong"] = written(spoilt)
    return cases


def cases() -> dict[str, Maker]:
    return {
        **{f"call: {key}": make for key, make in payload_cases().items()},
        **{f"program: {key}": archive(content) for key, content in PROGRAMS.items()},
        **{f"archive: {key}": make for key, make in ARCHIVES.items()},
        **{f"polyglot: {key}": make for key, make in POLYGLOTS.items()},
        **{f"cut: {key}": make for key, make in truncation_cases().items()},
    }
