"""Files that a fuzzer makes up as it learns which of the readers' branches they reach.

``make fuzz-guided MINUTES=10`` installs atheris, which has wheels for some Pythons on Linux only,
and runs this. Where ``fuzz.py`` changes sound files at random, here each new branch is built upon:
in the readers, in the scan of pickles, in torch's own unpickler and in safetensors' headers.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["we_surgery.checkpoint", "torch._weights_only_unpickler", "pickletools"]
):
    import torch._weights_only_unpickler  # noqa: F401
    from fuzz import repacked, sound_files, survive

    import we_surgery.checkpoint  # noqa: F401


def pickle_of(archive: bytes) -> bytes:
    with zipfile.ZipFile(BytesIO(archive)) as records:
        name = next(name for name in records.namelist() if name.endswith("data.pkl"))
        return records.read(name)


class Target:
    """What atheris calls: the first byte says in what the others are wrapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = sound_files()
        self.archives = [self.files["module"], self.files["state"]]
        self.counts = {"refused": 0, "read": 0, "broken": 0}

    def seeds(self) -> list[bytes]:
        """Each sound file, and the pickle of each archive, which changes leave an archive of."""
        pickles = [
            bytes([place]) + pickle_of(archive) for place, archive in enumerate(self.archives)
        ]
        return pickles + [bytes([len(pickles)]) + content for content in self.files.values()]

    def __call__(self, data: bytes) -> None:
        if not data:
            return
        place, content = data[0] % (len(self.archives) + 1), data[1:]
        if place < len(self.archives):
            content = repacked(self.archives[place], lambda _: content)
        try:
            self.counts[survive(content, self.folder)] += 1
        except Exception as error:
            self.counts["broken"] += 1
            kept = Path(f"fuzz-{hashlib.sha256(content).hexdigest()[:12]}.bin")
            kept.write_bytes(content)
            sys.stdout.write(f"{kept}: {type(error).__name__}: {error}\n")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=1.0)
    options.add_argument("--seed", type=int, default=1)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch, "corpus")
        corpus.mkdir()
        target = Target(Path(scratch))
        for place, seed in enumerate(target.seeds()):
            (corpus / f"seed-{place}").write_bytes(seed)
        report = Path(scratch, "counts")
        child = os.fork()
        if not child:
            fuzz_in_this_process(target, corpus, given.minutes, given.seed, report)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = len(list(corpus.iterdir()))
        counts = report.read_text() if report.exists() else "none: the process died"
        sys.stdout.write(f"{counts}; {found} files that reach something new\n")
    sys.exit(code != 0 or "'broken': 0" not in counts)


def fuzz_in_this_process(
    target: Target, corpus: Path, minutes: float, seed: int, report: Path
) -> None:
    """Never returns: libFuzzer ends the process when the time is over."""

    def counted(data: bytes) -> None:
        target(data)
        report.write_text(str(target.counts))

    arguments = [f"-max_total_time={int(60 * minutes)}", f"-seed={seed}", "-max_len=20000"]
    # Opening a file must not take gigabytes or minutes either.
    arguments += ["-rss_limit_mb=4096", "-timeout=60", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *arguments, str(corpus)], counted)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
