import tempfile
from pathlib import Path

import fuzz
from hypothesis import given, settings
from hypothesis import strategies as st

FILES = fuzz.sound_files()


def test_the_sound_files_are_read() -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert {fuzz.survive(content, Path(folder)) for content in FILES.values()} == {"read"}


@given(st.integers(0, 1 << 48))
@settings(max_examples=400, derandomize=True, deadline=None, database=None)
def test_a_changed_file_is_read_or_refused_and_nothing_else(seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fuzz.survive(fuzz.hostile_file(seed, FILES), Path(folder))


@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x02" + bytes(7) + b"{"]),
)
@settings(max_examples=200, derandomize=True, deadline=None, database=None)
def test_any_bytes_are_refused(content: bytes, start: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert fuzz.survive(start + content, Path(folder)) == "refused"
