import gzip
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.ao.quantization.quantize_fx
from safetensors.torch import save_file
from torch import nn

from we_surgery.checkpoint import read
from we_surgery.errors import InputError, WESurgeryError

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "model", "model.bin.tmp"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_the_content_decides_and_not_the_name(name, kind, tmp_path):
    path = tmp_path / name
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "zip")
    contents = read(path)
    assert contents.kind == ("safetensors" if kind == "safetensors" else "state_dict")
    assert contents.path == path
    assert contents.state_dict.keys() == STATE.keys()
    assert all(torch.equal(contents.state_dict[key], STATE[key]) for key in STATE)


def make_torchscript(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Sequential(nn.Linear(2, 2))), path)


def make_export(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
        torch.export.save(program, path)


def make_old_export(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")


def make_foreign_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "")


def make_onnx(path):
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "graph", ends[:1], ends[1:])
    path.write_bytes(onnx.helper.make_model(graph, producer_name="pytorch").SerializeToString())


def make_keras(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", "")


def make_npz(path):
    with path.open("wb") as file:
        np.savez(file, weight=np.ones(3))


def make_quantized(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(2, 2))
        torch.save(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}), path)


def make_quantized_graph(path):
    inputs = (torch.ones(1, 2),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapping = torch.ao.quantization.get_default_qconfig_mapping()
        model = nn.Sequential(nn.Linear(2, 2)).eval()
        prepared = torch.ao.quantization.quantize_fx.prepare_fx(model, mapping, inputs)
        prepared(*inputs)
        torch.save(torch.ao.quantization.quantize_fx.convert_fx(prepared), path)


def make_npy(path):
    with path.open("wb") as file:
        np.save(file, np.ones(3))


def make_saved_model(path):
    path.mkdir()
    (path / "saved_model.pb").touch()


def make_tar(path):
    inner = path.parent / "inner"
    inner.write_text("x")
    with tarfile.open(path, "w") as archive:
        archive.add(inner)


def make_legacy_module(path):
    torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=False)


def make_truncated_zip(path):
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-100])


def make_corrupt_zip(path):
    torch.save({"weight": torch.zeros(5000)}, path)
    content = path.read_bytes()
    assert b"_rebuild_tensor_v2" in content
    path.write_bytes(content.replace(b"_rebuild_tensor_v2", b"_rebuild_tens\xff\xff_v2"))


def make_truncated_legacy(path):
    torch.save({"weight": torch.zeros(500)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-100])


def make_truncated_safetensors(path):
    save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:-4])


def make_safetensors_header_only(path):
    save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:40])


def make_plain_pickle(path):
    path.write_bytes(pickle.dumps({"weight": [1, 2]}))


UNREADABLE = {
    "torchscript": (make_torchscript, "is TorchScript", "eager model"),
    "export": (make_export, "is a torch.export archive", "eager model"),
    "old export": (make_old_export, "is a torch.export archive", "eager model"),
    "foreign zip": (make_foreign_zip, "torch.save did not write", "torch.save or safetensors"),
    "tar": (make_tar, "is a tar archive", "Unpack"),
    "legacy module": (make_legacy_module, "torch before 1.6", "Save it again"),
    "truncated zip": (make_truncated_zip, "damaged or cut short", "again"),
    "corrupt zip": (make_corrupt_zip, "does not fit its checksum", "again"),
    "truncated legacy": (make_truncated_legacy, "cannot be read", "again"),
    "truncated safetensors": (make_truncated_safetensors, "damaged or cut short", "again"),
    "safetensors header": (make_safetensors_header_only, "cut short", "again"),
    "plain pickle": (make_plain_pickle, "pickle that torch.save did not write", "torch.save"),
    "empty": (lambda path: path.write_bytes(b""), "is empty", "again"),
    "one byte": (lambda path: path.write_bytes(b"\x80"), "cut short", "again"),
    "garbage": (lambda path: path.write_bytes(b"garbage!" * 500), "not hold a model", "download"),
    "lfs pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is a Git LFS pointer",
        "git lfs pull",
    ),
    "hdf5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(40)), "HDF5", "PyTorch"),
    "gguf": (lambda path: path.write_bytes(b"GGUF\x03" + bytes(40)), "is a GGUF file", "made from"),
    "tflite": (lambda path: path.write_bytes(b"\x1c\0\0\0TFL3" + bytes(40)), "Lite", "PyTorch"),
    "onnx": (make_onnx, "is an ONNX model", "exported from"),
    "quantized": (make_quantized, "packed weights of a quantized model", "float model"),
    "quantized graph": (make_quantized_graph, "packed weights of a quantized", "float model"),
    "keras": (make_keras, "is a Keras model", "PyTorch"),
    "npz": (make_npz, "NumPy arrays", "save"),
    "npy": (make_npy, "a NumPy array", "save"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x")), "by gzip", "gunzip"),
    "saved model file": (
        lambda path: path.write_bytes(b"\x08\x01\x12\x90\x02" + bytes(40)),
        "is a TensorFlow SavedModel",
        "PyTorch",
    ),
    "saved model": (make_saved_model, "is a TensorFlow SavedModel", "PyTorch"),
    "zip start": (lambda path: path.write_bytes(b"PK\x03\x04rest"), "damaged", "again"),
    "folder": (lambda path: path.mkdir(), "is a folder", "file in it"),
    "list": (lambda path: torch.save([1], path), "holds list", "state dict"),
    "tensor": (lambda path: torch.save(torch.ones(2), path), "holds Tensor", "state dict"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_file_that_cannot_be_read_says_why_and_what_to_do(case, tmp_path):
    make, cause, cure = UNREADABLE[case]
    path = tmp_path / "file.pt"
    make(path)
    with pytest.raises(InputError) as caught:
        read(path)
    assert cause in caught.value.cause
    assert str(path) in caught.value.cause
    assert cure in caught.value.cure


def test_a_whole_module_of_an_old_torch_opens_when_it_is_trusted(tmp_path):
    make_legacy_module(tmp_path / "model.pt")
    assert read(tmp_path / "model.pt", trust=True).kind == "module"


def test_a_wrong_bit_in_a_weight_is_found_by_its_checksum(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.ones(64, 64), "bias": torch.zeros(64)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(9).numpy().tobytes()) + 6] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="does not fit its checksum"):
        read(path)


def test_a_file_without_checksums_opens(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(64, 64), "none": torch.ones(0)}, tmp_path / "model.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read(tmp_path / "model.pt").kind == "state_dict"


def test_a_missing_file_names_one_beside_it_that_looks_like_it(tmp_path):
    torch.save(STATE, tmp_path / "resnet.pt")
    with pytest.raises(InputError, match=r"did you mean 'resnet\.pt'"):
        read(tmp_path / "resent.pt")
    with pytest.raises(InputError, match="there is no file"):
        read(tmp_path / "nowhere" / "model.pt")


def test_a_link_to_a_missing_file_is_named(tmp_path):
    (tmp_path / "link.pt").symlink_to("gone.pt")
    with pytest.raises(InputError, match=r"link\.pt is a symbolic link to gone\.pt"):
        read(tmp_path / "link.pt")


@pytest.mark.parametrize("name", ["\0", "a" * 5000])
def test_an_impossible_name_is_an_input_error(name):
    with pytest.raises(InputError):
        read(Path(name))


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_cut_anywhere_is_never_a_raw_error(kind, tmp_path):
    path = tmp_path / "model.pt"
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:length])
        with pytest.raises(WESurgeryError):
            read(path)


def test_arguments_without_an_architecture_are_refused(tmp_path):
    torch.save(STATE, tmp_path / "state.pt")
    with pytest.raises(InputError, match="num_classes=10"):
        read(tmp_path / "state.pt", arguments={"num_classes": 10})


def test_a_safetensors_file_keeps_its_own_order(tmp_path):
    # safetensors writes wider types first.
    save_file({"a": torch.ones(2, dtype=torch.float16), "b": torch.ones(2)}, tmp_path / "s")
    assert list(read(tmp_path / "s").state_dict) == ["b", "a"]


def test_a_safetensors_file_has_no_key(tmp_path):
    save_file(STATE, tmp_path / "s")
    with pytest.raises(InputError, match="nested under a key 'ema'"):
        read(tmp_path / "s", key="ema")


def test_weights_of_a_gpu_come_to_the_cpu(tmp_path):
    # As a file of another machine says it, which has a device that this one lacks.
    torch.save(STATE, tmp_path / "cpu.pt")
    with (
        zipfile.ZipFile(tmp_path / "cpu.pt") as source,
        zipfile.ZipFile(tmp_path / "cuda.pt", "w") as target,
    ):
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith("data.pkl"):
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:7")
                assert b"cuda:7" in content
            target.writestr(info.filename, content)
    state = read(tmp_path / "cuda.pt").state_dict
    assert {value.device.type for value in state.values()} == {"cpu"}
    assert torch.equal(state["weight"], STATE["weight"])
