"""``transformers:FOLDER``: convert, load and strip what ``save_pretrained`` wrote."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import we_surgery as ws
from we_surgery.cli import convert_command, strip_command
from we_surgery.errors import InputError

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    ViTConfig,
    ViTForImageClassification,
)

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """Its names on the hub are not those of the model."""
    torch.manual_seed(0)
    config = ViTConfig(**SMALL, intermediate_size=16, image_size=16, patch_size=8, num_labels=3)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def run(command, *words: object) -> None:
    result = CliRunner().invoke(command, [str(word) for word in words])
    assert result.exit_code == 0, result.output


def test_from_pretrained_opens_what_was_converted_and_stripped(vit: Path, tmp_path: Path) -> None:
    run(convert_command, vit, "--arch", f"transformers:{vit}", "--init", "preserve")
    excited = ws.load(f"{vit}.we", architecture=f"transformers:{vit}.we").eval()
    assert excited.classifier.raw_weight is not None
    run(strip_command, f"{vit}.we", "-o", tmp_path / "out")
    model, found = ViTForImageClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(found.values())
    images = torch.randn(2, 3, 16, 16)
    before = ViTForImageClassification.from_pretrained(vit)(images).logits
    torch.testing.assert_close(model(images).logits, before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(images).logits, excited(images).logits)


def test_a_tied_weight_is_whole_and_an_unused_one_is_named(tmp_path: Path) -> None:
    config = BertConfig(**SMALL, intermediate_size=16, vocab_size=11, max_position_embeddings=8)
    BertForPreTraining(config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(written | {"architectures": ["BertForMaskedLM"]})
    )
    from we_surgery.checkpoint import model_from, read

    contents = read(tmp_path)
    model = model_from(contents, architecture=f"transformers:{tmp_path}")
    assert isinstance(model, BertForMaskedLM)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert [note for note in contents.notes if "'cls.seq_relationship.weight'" in note]


def test_the_error_names_the_architecture_as_a_shell_takes_it(vit: Path) -> None:
    spaced = vit.rename(vit.with_name("my vit"))
    with pytest.raises(InputError) as caught:
        ws.load(spaced)
    assert f"'transformers:{spaced}'" in caught.value.cure


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": None}, "0 architectures"),
        ({"architectures": ["pipeline"]}, "not a model of transformers"),
        ({"model_type": "unheard of"}, "unheard of"),
        ({"num_labels": 5}, "does not fit"),
    ],
)
def test_what_does_not_fit_is_an_error(vit: Path, changes: dict[str, object], said: str) -> None:
    config = json.loads((vit / "config.json").read_text())
    for key in ("id2label", "label2id"):
        config.pop(key)
    (vit / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(InputError, match=said):
        ws.load(vit, architecture=f"transformers:{vit}")


def test_no_code_of_the_hub_is_run(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((vit / "config.json").read_text())
    hostile = {
        "attn_implementation": "somebody/kernel",
        "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"},
    }
    (vit / "config.json").write_text(json.dumps(config | hostile))
    (vit / "code.py").write_text("raise SystemExit")
    model = ws.load(vit, architecture=f"transformers:{vit}")
    assert type(model) is ViTForImageClassification


def test_a_folder_without_a_config_is_named() -> None:
    with pytest.raises(InputError, match=r"no config\.json in 'nowhere'"):
        ws.Architecture.parse("transformers:nowhere").build()
