"""Models of transformers, built as the ``config.json`` in a folder says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from we_surgery.errors import InputError

_INSTALL = "Install it: pip install transformers."

# A config may name code on the hub: as an attention kernel, or as classes of its own.
_LOCAL_CODE = {"attn_implementation": "eager"}


def build(folder: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The model that ``config.json`` names, with new weights; of code that is installed."""
    transformers = _transformers()
    config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, **arguments
    )
    names = config.architectures or []
    if len(names) != 1:
        raise ValueError(f"its config.json names {len(names)} architectures, not one")
    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(f"{names[0]!r}, in its config.json, is not a model of transformers")
    model: nn.Module = found._from_config(config, **_LOCAL_CODE)  # type: ignore[attr-defined]
    return model


def named_as_in(model: Any, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A vanilla state dict under the model's own names, and which entries it does not use.

    Files have the names of the hub, which change between versions of transformers, and hold tied
    weights once.
    """
    loaded, found = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=dict(state),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **_LOCAL_CODE,
    )
    if found["missing_keys"] or found["mismatched_keys"]:
        return dict(state), []  # loading them says what does not fit
    return loaded.state_dict(), sorted(found["unexpected_keys"])


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError("transformers is not installed", _INSTALL) from error
    return transformers
