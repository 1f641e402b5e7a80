import argparse
import builtins
import contextlib
import functools
import importlib
import os
import subprocess
import sys
import textwrap
import webbrowser
from pathlib import Path

import numpy
import pytest
import timm.layers
import torch
from torch import nn

from we_surgery.checkpoint import read
from we_surgery.converted import layer as layers
from we_surgery.errors import InputError


def name(module, attribute):
    """The pickle instruction that asks for ``module.attribute``."""
    return f"c{module}\n{attribute}\n".encode()


def text(value):
    encoded = value.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def program(*instructions):
    return b"\x80\x02" + b"".join(instructions) + b"."


class HostileModule(nn.Module):
    def __init__(self, command):
        super().__init__()
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


PAYLOADS = {
    "os.system": (lambda calls, c: calls(os.system, f"touch {c}"), "system"),
    "eval": (lambda calls, c: calls(eval, f"__import__('os').mkdir({str(c)!r})"), "builtins.eval"),
    "exec": (
        lambda calls, c: calls(builtins.exec, f"import os; os.mkdir({str(c)!r})"),
        "builtins.exec",
    ),
    "subprocess": (
        lambda calls, c: calls(subprocess.check_call, ["touch", str(c)]),
        "subprocess.check_call",
    ),
    "getoutput": (
        lambda calls, c: calls(subprocess.getoutput, f"touch {c}"),
        "subprocess.getoutput",
    ),
    "a module's own __reduce__": (lambda calls, c: HostileModule(f"touch {c}"), "system"),
    "partial": (lambda calls, c: calls(functools.partial(os.system, f"touch {c}")), "system"),
    "path": (lambda calls, c: calls(Path.touch, c), "pathlib"),
}


@pytest.fixture(params=PAYLOADS, ids=list(PAYLOADS))
def payload(request, calls, canary):
    make, wanted = PAYLOADS[request.param]
    return make(calls, canary), wanted


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_payload_does_not_run_and_is_named(payload, kind, tmp_path, canary):
    content, wanted = payload
    path = tmp_path / "evil.pt"
    torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(InputError, match=wanted) as caught:
        read(path)
    assert "trust=True" in caught.value.cure
    assert not canary.exists()


def test_the_same_payloads_run_when_the_file_is_trusted(payload, tmp_path, canary):
    torch.save(payload[0], tmp_path / "evil.pt")
    # What the payload returns is no model, but it has run by then.
    with contextlib.suppress(InputError):
        read(tmp_path / "evil.pt", trust=True)
    assert canary.exists()


def test_a_chain_of_getattr_does_not_run(write_archive, canary):
    path = write_archive(
        program(
            name("__builtin__", "getattr"),
            b"(",
            name("importlib", "import_module"),
            text("os") + b"\x85R",
            text("system") + b"tR",
            text(f"touch {canary}") + b"\x85R",
        )
    )
    with pytest.raises(InputError, match=r"builtins\.getattr, importlib\.import_module"):
        read(path)
    assert not canary.exists()
    with contextlib.suppress(InputError):
        read(path, trust=True)
    assert canary.exists()


def test_a_payload_inside_a_valid_state_dict_does_not_run(calls, tmp_path, canary):
    state = nn.Linear(2, 2).state_dict()
    content = {"state_dict": state, "epoch": calls(os.system, f"touch {canary}")}
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="system"):
        read(tmp_path / "checkpoint.pt")
    assert not canary.exists()


def test_a_payload_inside_a_module_does_not_run(calls, tmp_path, canary):
    model = nn.Linear(2, 2)
    model.extra = calls(os.system, f"touch {canary}")
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(InputError, match="system"):
        read(tmp_path / "model.pt")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("torch.hub", "load"),
        ("torch", "load"),
        ("torch.utils.cpp_extension", "load"),
        ("torch.fx.graph_module", "GraphModule"),
        ("torch.jit._script", "RecursiveScriptModule"),
        ("torch.distributed.nn.api.remote_module", "RemoteModule"),
        ("torch.nn.modules.module", "torch"),
        ("torch.nn.functional", "linear"),
        ("torch.nn.parallel.distributed", "DistributedDataParallel"),
        ("torchvision.datasets.folder", "ImageFolder"),
        ("torchvision.models.resnet", "resnet18"),
        ("torchvision.models.feature_extraction", "DualGraphModule"),
        ("timm.models._features_fx", "GraphModule"),
        ("timm.models._helpers", "load_checkpoint"),
        ("timm.models..__main__", "main"),
        ("timm.__main__", "main"),
        ("we_surgery.__main__", "we_surgery"),
        ("webbrowser", "open"),
        ("builtins", "getattr"),
        ("__builtin__", "getattr"),
        ("torch.nn.modules.linear", "Linear.__init__"),
        ("we_surgery.converted", "os:system:weight"),
        ("we_surgery.converted", "subprocess:Popen:weight"),
        ("we_surgery.converted", "torch/nn/modules/linear:Linear:forward"),
        ("we_surgery.converted", "torch/nn/modules/linear:Linear"),
        ("we_surgery.converted", "torch/nn/modules/linear:Linear/__init__:weight"),
        ("we_surgery.converted", "torch/fx/graph_module:GraphModule:weight"),
        ("we_surgery.converted", "importlib"),
    ],
)
def test_a_name_that_is_no_allowed_class_is_refused(module, attribute, write_archive):
    with pytest.raises(InputError, match="is refused: it refers to"):
        read(write_archive(program(name(module, attribute))))


def test_a_class_that_an_allowed_package_only_imported_is_refused(write_archive, monkeypatch):
    foreign = type("Foreign", (nn.Module,), {"__module__": "foreign.nets"})
    monkeypatch.setattr("torchvision.models.resnet.Foreign", foreign, raising=False)
    with pytest.raises(InputError, match=r"foreign\.nets\.Foreign \(from another package\)"):
        read(write_archive(program(name("torchvision.models.resnet", "Foreign"), b")\x81")))


def test_a_refused_name_of_an_unlisted_package_is_not_imported(
    write_archive, tmp_path, monkeypatch
):
    (tmp_path / "trap.py").write_text("import pathlib\npathlib.Path('canary').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    path = write_archive(program(name("trap", "Net"), b")\x81"))
    with pytest.raises(InputError, match=r"trap\.Net") as caught:
        read(path)
    assert "--allow trap" in caught.value.cure
    assert "trap" not in sys.modules
    assert not Path("canary").exists()


def test_a_package_that_only_begins_like_an_allowed_one_is_refused(write_archive):
    for module in ("torchvision_evil.models", "timmy", "torchx", "we_surgery_evil"):
        with pytest.raises(InputError, match="from another package"):
            read(write_archive(program(name(module, "Net"))))


LINEAR = name("torch.nn.modules.linear", "Linear")
PARTIAL = name("functools", "partial")


@pytest.mark.parametrize(
    "content",
    {
        "constructor of an allowed class": program(LINEAR, b"K\x03K\x04\x86R"),
        "new object with arguments": program(LINEAR, b"K\x03\x85\x81"),
        "constructor through the memo": program(LINEAR, b"q\x000h\x00K\x03K\x04\x86R"),
        "constructor through torch's own function": program(
            name("torch._tensor", "_rebuild_from_type_v2"),
            b"(",
            LINEAR,
            LINEAR,
            b"K\x03K\x04\x86Nt",
            b"R",
        ),
        "the same, hidden in itself": program(
            name("torch._tensor", "_rebuild_from_type_v2"),
            b"(",
            name("torch._tensor", "_rebuild_from_type_v2"),
            LINEAR,
            b"(",
            LINEAR,
            LINEAR,
            b"K\x03K\x04\x86NtNtR",
        ),
        "arguments in a list": program(
            name("torch._tensor", "_rebuild_from_type_v2"), b"](", LINEAR, LINEAR, b"NNeR"
        ),
        "call of what a call made": program(LINEAR, b")\x81)R"),
        "partial over a whole model": program(
            PARTIAL, name("torchvision.models.resnet", "ResNet"), b"\x85R"
        ),
        "partial over a function": program(
            PARTIAL, name("timm.layers.activations", "gelu"), b"\x85R"
        ),
        "partial given another callable": program(
            PARTIAL,
            name("torch.nn.modules.normalization", "LayerNorm"),
            b"\x85R(",
            name("torchvision.models.resnet", "ResNet"),
            b")}Ntb",
        ),
        "call of an allowed function": program(
            name("timm.layers.activations", "gelu"), b"K\x01\x85R"
        ),
        "numpy dtype of objects": program(name("numpy", "dtype"), b"(", text("O8"), b"\x89\x88tR"),
        "numpy dtype that shares": program(name("numpy", "dtype"), b"(", text("f8"), b"\x89\x89tR"),
        "numpy dtype with fields": program(
            name("numpy", "dtype"),
            b"(",
            text("f8"),
            b"\x89\x88tR(K\x03",
            text("<"),
            b"N}}J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
        ),
    }.values(),
)
def test_an_allowed_name_may_not_be_called_with_arguments_of_the_file(content, write_archive):
    with pytest.raises(InputError, match=r"called in a way|cannot be read safely"):
        read(write_archive(content))


def test_no_constructor_of_an_allowed_class_runs(write_archive, monkeypatch):
    ran = []
    monkeypatch.setattr(nn.Linear, "__init__", lambda *args, **kwargs: ran.append(args))
    with pytest.raises(InputError):
        read(write_archive(program(LINEAR, b"K\x03K\x04\x86R")))
    assert not ran


@pytest.mark.parametrize(
    ("content", "instruction"),
    [
        (b"\x80\x02(X\x02\x00\x00\x00idios\nsystem\n.", "INST"),
        (b"\x80\x02(" + name("os", "system") + text("id") + b"o.", "OBJ"),
        (b"\x80\x02" + text("os") + text("system") + b"\x93.", "STACK_GLOBAL"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x04N.", "protocol 4"),
    ],
)
def test_an_instruction_that_torch_save_never_writes_is_refused(
    content, instruction, write_archive
):
    with pytest.raises(InputError, match=instruction):
        read(write_archive(content))


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02", b"\x80\x02R.", b"\x80\x02h\x05.", b"\x80\x02t."]
)
def test_a_pickle_that_does_not_fit_together_is_an_input_error(content, write_archive):
    with pytest.raises(InputError, match="cannot be read"):
        read(write_archive(content))


def test_what_torch_was_told_to_allow_before_is_allowed_afterwards(tmp_path):
    model = nn.Linear(2, 2)
    model.best = numpy.float64(71.3)
    torch.save(model, tmp_path / "model.pt")
    told = [
        (nn.Linear, "torch.nn.modules.linear.Linear"),
        (numpy.dtypes.Float64DType, "numpy.dtypes.Float64DType"),
    ]
    with torch.serialization.safe_globals(told):
        assert read(tmp_path / "model.pt").model.best == 71.3
        assert set(told) <= set(torch.serialization.get_safe_globals())


def test_reading_leaves_nothing_allowed_behind(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    read(tmp_path / "model.pt")
    assert set(torch.serialization.get_safe_globals()) == before


def test_an_allowed_package_admits_its_modules_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(
        textwrap.dedent(
            """
            from torch import nn
            class Net(nn.Linear): pass
            class Config: pass
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    my_nets = importlib.import_module("my_nets")
    plain = my_nets.Net(2, 2)
    with_config = my_nets.Net(2, 2)
    with_config.config = my_nets.Config()
    torch.save(plain, "plain.pt")
    torch.save(with_config, "config.pt")
    try:
        with pytest.raises(InputError, match="--allow my_nets"):
            read("plain.pt")
        assert type(read("plain.pt", allow=["my_nets"]).model) is my_nets.Net
        assert type(read("plain.pt", allow="my_nets").model) is my_nets.Net
        with pytest.raises(InputError, match=r"my_nets\.Config .*not an nn.Module") as caught:
            read("config.pt", allow=["my_nets"])
        assert "--allow" not in caught.value.cure
        assert type(read("config.pt", trust=True).model.config) is my_nets.Config
    finally:
        del sys.modules["my_nets"]


def test_a_subclass_of_an_unlisted_package_stays_refused_when_it_is_excited(tmp_path, monkeypatch):
    (tmp_path / "excited_nets.py").write_text("from torch import nn\nclass Net(nn.Linear): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    excited_nets = importlib.import_module("excited_nets")
    import we_surgery as ws

    model = ws.convert(nn.Sequential(excited_nets.Net(4, 4)), mode="mwe")
    torch.save(model, tmp_path / "model.pt")
    try:
        with pytest.raises(InputError, match="--allow excited_nets"):
            read(tmp_path / "model.pt")
        found = read(tmp_path / "model.pt", allow=["excited_nets"]).model
        assert isinstance(found[0], excited_nets.Net)
        assert isinstance(found[0], layers.ExcitedLayer)
    finally:
        del sys.modules["excited_nets"]


def test_a_class_of_the_saving_script_is_refused_with_a_cure_of_its_own(write_archive):
    with pytest.raises(InputError, match=r"__main__\.Net") as caught:
        read(write_archive(program(name("__main__", "Net"), b")\x81")))
    assert "Move the class into a module" in caught.value.cure


def test_a_class_that_the_installed_package_lacks_is_named_so(write_archive):
    with pytest.raises(InputError, match="cannot be imported here") as caught:
        read(write_archive(program(name("timm.models.tomorrow", "Net"), b")\x81")))
    assert "Install the version" in caught.value.cure


def test_numbers_of_numpy_and_namespaces_are_plain_data(tmp_path):
    state = nn.Linear(2, 2).state_dict()
    content = {
        "state_dict": state,
        "best": numpy.float64(71.3),
        "epoch": numpy.int32(7),
        "args": argparse.Namespace(lr=0.1, model="resnet18"),
    }
    torch.save(content, tmp_path / "checkpoint.pt")
    contents = read(tmp_path / "checkpoint.pt")
    assert torch.equal(contents.state_dict["weight"], state["weight"])
    assert any("'args' (Namespace)" in note for note in contents.notes)


def test_an_enum_of_timm_is_plain_data_and_takes_one_string(tmp_path, write_archive):
    model = nn.Linear(2, 2)
    model.output_format = timm.layers.Format.NHWC
    torch.save(model, tmp_path / "model.pt")
    assert read(tmp_path / "model.pt").model.output_format is timm.layers.Format.NHWC
    enum = name("timm.layers.format", "Format")
    with pytest.raises(InputError, match="called in a way"):
        read(write_archive(program(enum, text("A"), b"]\x86R")))


@pytest.mark.parametrize("attribute", ["values", "_metadata"])
def test_a_mapping_whose_methods_are_hidden_is_an_input_error(attribute, tmp_path):
    state = nn.Linear(2, 2).state_dict()
    state.__dict__[attribute] = nn.Identity()
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(InputError, match=r"cannot be read|hides the method"):
        read(tmp_path / "state.pt")


def test_opening_no_browser(calls, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "get", lambda *args: opened.append(args))
    torch.save(calls(webbrowser.open, "http://localhost"), tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"webbrowser\.open"):
        read(tmp_path / "evil.pt")
    assert not opened
