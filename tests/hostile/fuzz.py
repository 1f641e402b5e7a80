"""Random files through the readers: sound ones with bytes changed, cut out, doubled and put in.

``python tests/hostile/fuzz.py --minutes 10`` runs for longer than the tests do. What breaks the
promise, an error that is none of ours, is kept as a file whose name is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import random
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

import we_surgery as ws
from we_surgery.checkpoint import read, strip_state_dict_with_report
from we_surgery.errors import WESurgeryError

# What a change is likelier to hit something with than with a random byte.
WORDS = [
    b"\x00",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"R",
    b"b",
    b"\x81",
    b"}",
    b"(",
    b"t",
    b"cos\nsystem\n",
]
WORDS += [
    b"-1",
    b"1e999",
    b"[",
    b"{",
    b'"',
    b"\xff\xff\xff\xff\xff\xff\xff\xff",
    b"h\x00",
    b"Q",
    b"s",
]


def sound_files() -> dict[str, bytes]:
    """Small files of each kind that the readers know."""
    torch.manual_seed(0)
    model = ws.convert(
        nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 2)), "lwe+mwe"
    )
    files = {}
    for name, content in {
        "module": model,
        "state": {"state_dict": model.state_dict(), "epoch": 1},
    }.items():
        for legacy in [False] if name == "module" else [False, True]:
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
            files[f"{name}{' legacy' * legacy}"] = buffer.getvalue()
    files["safetensors"] = safetensors_bytes(
        dict(model.state_dict()), {"we_surgery": '{"schema": 1}'}
    )
    return files


def repacked(archive: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """An archive whose pickle is changed and whose sums are right."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            record = old.read(name)
            new.writestr(name, change(record) if name.endswith("data.pkl") else record)
    return target.getvalue()


def mutated(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(changed) + 1)
        match draw.randrange(5):
            case 0:
                changed[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                changed[at:at] = draw.choice(WORDS)
            case 2:
                del changed[at : at + draw.randint(1, 16)]
            case 3:
                changed[at:at] = changed[at : at + draw.randint(1, 64)]
            case 4:
                word = draw.choice(WORDS)
                changed[at : at + len(word)] = word
    return bytes(changed)


def hostile_file(seed: int, files: dict[str, bytes]) -> bytes:
    """The file of a number, the same each time."""
    draw = random.Random(seed)
    name = draw.choice(sorted(files))
    if files[name].startswith(b"PK") and draw.random() < 0.8:
        return repacked(files[name], lambda pickle: mutated(pickle, draw))
    # The beginning says what the rest is.
    head = draw.choice([64, 1024, len(files[name])])
    return mutated(files[name][:head], draw) + files[name][head:]


def survive(content: bytes, folder: Path) -> str:
    """Reads and strips a file; raises anything but an error of ours."""
    path = folder / "fuzzed"
    path.write_bytes(content)
    try:
        contents = read(path)
        if contents.state_dict is not None:
            strip_state_dict_with_report(contents.state_dict)
    except WESurgeryError as error:
        if not (error.cause and error.cure):
            raise AssertionError("an error without a cause or a cure") from error
        return "refused"
    return "read"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=1.0)
    options.add_argument("--seed", type=int, default=0, help="the first number")
    given = options.parse_args()
    files, counts = sound_files(), {"refused": 0, "read": 0, "broken": 0}
    end, seed = time.monotonic() + 60 * given.minutes, given.seed
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            content = hostile_file(seed, files)
            try:
                counts[survive(content, Path(folder))] += 1
            except Exception as error:
                counts["broken"] += 1
                kept = Path(f"fuzz-{hashlib.sha256(content).hexdigest()[:12]}.bin")
                kept.write_bytes(content)
                sys.stdout.write(f"{kept} (number {seed}): {type(error).__name__}: {error}\n")
            seed += 1
    sys.stdout.write(f"{sum(counts.values())} files from number {given.seed} on: {counts}\n")
    sys.exit(bool(counts["broken"]))


if __name__ == "__main__":
    main()
