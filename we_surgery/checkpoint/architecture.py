"""A model's architecture by name: what builds the modules that a state dict's tensors go into."""

from __future__ import annotations

import inspect
import json
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from we_surgery._util.imports import REFERENCE, imported, working_folder_importable
from we_surgery.checkpoint import transformers_folder
from we_surgery.errors import InputError, near_matches

FORMS = "torchvision:NAME, timm:NAME, transformers:FOLDER or package.module:factory"
_LIBRARIES = ("torchvision", "timm", "transformers")

# What the arguments of torchvision's and timm's factories begin with that fetch or read files.
_FETCHING = ("weights", "pretrained", "checkpoint_path", "cache_dir")


@dataclass(frozen=True)
class Architecture:
    """How to build a model: a factory's name and its keyword arguments.

    Attributes:
        name: ``torchvision:resnet50``, ``timm:mixer_s16_224``, ``package.module:factory``, or
            ``transformers:FOLDER`` for what the ``config.json`` in a folder says.
        arguments: keyword arguments of the factory; JSON types where they are to be stored.
        from_file: whether a file says so and not the caller. Such a name imports no code but
            torchvision and timm, and fetches no weights.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    from_file: bool = field(default=False, compare=False)

    @staticmethod
    def parse(name: str, arguments: Mapping[str, Any] | None = None) -> Architecture:
        """An architecture from its name, checked for its form and not yet for its existence.

        Raises:
            InputError: the name has none of these forms.
        """
        if not _is_named_like_architecture(name):
            raise InputError(
                f"{name!r} is not an architecture{_qualified_matches(name)}", f"Give {FORMS}."
            )
        return Architecture(name, dict(arguments or {}))

    @property
    def names_folder(self) -> bool:
        """Whether it is in a folder, which no file can rely on."""
        return self.name.startswith("transformers:")

    @property
    def fetches_weights(self) -> bool:
        """Whether the arguments ask for trained weights."""
        return any(key.startswith(_FETCHING) and value for key, value in self.arguments.items())

    def build(self, allow: Sequence[str] = ()) -> nn.Module:
        """The model, with new weights unless the arguments ask for others.

        Args:
            allow: packages whose factories may be imported although a file names them.

        Raises:
            InputError: there is no such architecture, it does not take these arguments, or a
                file names a factory or weights that it must not name.
        """
        source, _, name = self.name.partition(":")
        architecture = self
        if self.from_file:
            architecture = self._refuse_or_drop_what_a_file_may_not_say(allow)
        arguments = dict(architecture.arguments)
        factory: Callable[..., Any]
        if source == "torchvision":
            factory, arguments = _torchvision_factory(name, arguments)
        elif source == "timm":
            factory = _timm_factory(name)
        elif source == "transformers":
            factory = _transformers_factory(name)
        else:
            factory = imported("the architecture", self.name)
        try:
            # Libraries import optional packages, which are not sought in that folder.
            is_own = source not in _LIBRARIES
            with working_folder_importable() if is_own else nullcontext():
                model = factory(**arguments)
        except Exception as error:
            raise InputError(
                f"{self.name} cannot be built with {arguments or 'no arguments'}: "
                f"{type(error).__name__}: {error}",
                "Correct its arguments (--arch-arg KEY=VALUE; in Python, `Architecture.parse`).",
            ) from error
        if not isinstance(model, nn.Module):
            raise InputError(
                f"{self.name} returned {type(model).__name__}, not an nn.Module",
                "Name a class or function that returns the model.",
            )
        return model

    def to_dict(self) -> dict[str, Any]:
        """The architecture as JSON types."""
        try:
            arguments = json.loads(json.dumps(dict(self.arguments)))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the arguments of {self.name} cannot be stored: {error}",
                "Use numbers, strings, lists and mappings, or a factory of your own that takes "
                "no arguments.",
            ) from error
        return {"name": self.name, "arguments": arguments}

    @staticmethod
    def from_dict(data: Any) -> Architecture:
        """The inverse of :meth:`to_dict`, marked as coming from a file."""
        name = data.get("name") if isinstance(data, Mapping) else None
        arguments = data.get("arguments", {}) if isinstance(data, Mapping) else None
        if (
            not isinstance(name, str)
            or not isinstance(arguments, Mapping)
            or not all(isinstance(key, str) for key in arguments)
        ):
            raise InputError(
                f"the architecture in the file cannot be read: {reprlib.repr(data)}",
                "The file is damaged; name its architecture yourself (--arch; `architecture=`).",
            )
        return replace(Architecture.parse(name, arguments), from_file=True)

    def _refuse_or_drop_what_a_file_may_not_say(self, allow: Sequence[str]) -> Architecture:
        source, _, name = self.name.partition(":")
        if source not in ("torchvision", "timm"):
            if not any(source == package or source.startswith(f"{package}.") for package in allow):
                raise InputError(
                    f"the file refers to the architecture {self.name}, which is code to import",
                    f"If you trust it, give --arch {self.name} (`architecture=`), or --allow "
                    f"{source.partition('.')[0]} (`allow=`).",
                )
            return self
        fetching = {k: v for k, v in self.arguments.items() if k.startswith(_FETCHING)}
        asked = [key for key, value in fetching.items() if value]
        if asked and source == "torchvision" and _weights_shape_model(name):
            raise InputError(
                f"the file's architecture {self.name} was built with {asked[0]}="
                f"{fetching[asked[0]]!r}, which changes the layers of this model and would "
                "download a file",
                f"Give --arch {self.name} with its arguments yourself (`architecture=`).",
            )
        kept = {key: value for key, value in self.arguments.items() if key not in fetching}
        return replace(self, arguments=kept)


def looks_like_architecture(source: str) -> bool:
    """Whether ``source`` names an architecture; a file of that name comes first."""
    return _is_named_like_architecture(source) and not Path(source).exists()


def _is_named_like_architecture(name: str) -> bool:
    source, colon, _ = name.partition(":")
    return (bool(colon) and source in _LIBRARIES) or REFERENCE.fullmatch(name) is not None


def _qualified_matches(name: str) -> str:
    """The torchvision and timm names that a name without a source may mean."""
    import timm
    from torchvision.models import list_models

    known = [f"torchvision:{known}" for known in list_models()]
    known += [f"timm:{known}" for known in timm.list_models()]
    word = name.rpartition(":")[2].lower()
    exact = [candidate for candidate in known if candidate.partition(":")[2] == word]
    if exact:
        return f"; did you mean {' or '.join(repr(match) for match in exact)}?"
    return near_matches(f"timm:{word}", known)


def _torchvision_factory(
    name: str, arguments: dict[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    from torchvision.models import get_model_builder, list_models

    try:
        builder: Callable[..., Any] = get_model_builder(name)
    except ValueError as error:
        raise _unknown("torchvision", name, list_models()) from error
    # Named here so that no default of another version fetches anything.
    unweighted = {
        key: None
        for key in ("weights", "weights_backbone")
        if key in inspect.signature(builder).parameters
    }
    return builder, unweighted | arguments


def _weights_shape_model(name: str) -> bool:
    """Whether ``weights=`` changes more than values: frozen norms, heads, input transforms."""
    from torchvision.models import get_model_builder, list_models

    if name.lower() not in list_models():
        return False
    module: str = get_model_builder(name).__module__
    is_classifier = module.count(".") == 2
    return not is_classifier or name.lower() in ("googlenet", "inception_v3")


def _timm_factory(name: str) -> Callable[..., Any]:
    import timm

    # Only registered names: `hf-hub:` and `local-dir:` ones fetch or read files.
    if ":" in name or not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())

    def create(**arguments: Any) -> Any:
        return timm.create_model(name, **arguments)

    return create


def _transformers_factory(folder: str) -> Callable[..., Any]:
    if not Path(folder, "config.json").is_file():
        raise InputError(
            f"there is no config.json in {folder or '.'!r}",
            "Give the folder of a model of transformers.",
        )
    return lambda **arguments: transformers_folder.build(folder, arguments)


def _unknown(source: str, name: str, known: Iterable[str]) -> InputError:
    return InputError(
        f"{source} has no model {name!r}{near_matches(name, known)}",
        f"`{source}.{'list_models' if source == 'timm' else 'models.list_models'}()` lists "
        "the names.",
    )
