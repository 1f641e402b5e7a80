"""The installed libraries, read as source: what classes that a file may name could ever do.

A file cannot say which method runs, but it can set every attribute that a method reads. So no
method that loading, tracing or a forward pass reaches may open, fetch, import or compile anything.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from we_surgery.checkpoint.safe_pickle import permissions

FUNCTIONS = {"open", "eval", "exec", "compile", "__import__"}
METHODS = set(
    "import_module load_state_dict_from_url load_state_dict_from_hf load_url urlopen urlretrieve "
    "hf_hub_download download system popen Popen run check_call check_output load_library "
    "load_inline script GraphModule symbolic_trace create_feature_extractor load_checkpoint "
    "load_pretrained _load_weights read_text read_bytes write_text write_bytes unlink rmtree "
    "makedirs mkdir fromfile memmap loadtxt".split()
)
LOADERS = {
    ("torch", "load"),
    ("np", "load"),
    ("numpy", "load"),
    ("pickle", "load"),
    ("json", "load"),
}
ANY = re.compile(rf"\b({'|'.join(FUNCTIONS | METHODS | {'load'})})\(")

# Each was read. What a model class's constructor does cannot be reached, for a file may hold no
# model class as a value; and no method named here is called by another one.
REVIEWED = {
    "timm.models._features_fx.FeatureGraphNet.__init__": "the constructor of a model",
    "timm.models._features_fx.GraphExtractNet.__init__": "the constructor of a model",
    "timm.models.naflexvit.NaFlexVit.load_pretrained": "called by timm's factories alone",
    "timm.models.resnetv2.ResNetV2.load_pretrained": "called by timm's factories alone",
    "timm.models.vision_transformer.VisionTransformer.load_pretrained": "the same",
    "torchvision.models._api.WeightsEnum.get_state_dict": "no module",
}


def sources(package: str) -> Iterator[tuple[str, Path]]:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    if not spec.submodule_search_locations:
        assert spec.origin is not None
        yield package, Path(spec.origin)
        return
    for folder in map(Path, spec.submodule_search_locations):
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(p for p in inner if p != "__init__"))), path


def dangerous(call: ast.Call) -> bool:
    match call.func:
        case ast.Name(name):
            return name in FUNCTIONS | METHODS
        case ast.Attribute(ast.Name(owner), "load"):
            return (owner, "load") in LOADERS
        case ast.Attribute(_, name):
            return name in METHODS
    return False


def dangerous_methods(package: str) -> set[str]:
    found = set()
    for module, path in sources(package):
        text = path.read_text()
        if not ANY.search(text):
            continue
        for kind in (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ClassDef)):
            for method in (n for n in kind.body if isinstance(n, ast.FunctionDef)):
                if any(isinstance(n, ast.Call) and dangerous(n) for n in ast.walk(method)):
                    found.add(f"{module}.{kind.name}.{method.name}")
    return found


@pytest.mark.parametrize("package", permissions._PACKAGES)
def test_no_method_of_an_admitted_class_opens_fetches_imports_or_compiles(package: str) -> None:
    assert dangerous_methods(package) <= REVIEWED.keys()


@pytest.mark.parametrize("package", permissions._PARTIAL_OVER)
def test_what_a_file_may_let_a_model_construct_does_none_of_that_at_all(package: str) -> None:
    assert not dangerous_methods(package)


def test_the_reading_of_sources_finds_what_is_there() -> None:
    assert "timm.models.vision_transformer.VisionTransformer.load_pretrained" in dangerous_methods(
        "timm.models"
    )
