"""The authors' published layers and attach train the same weights."""

import evidence_data
import evidence_public
import pytest
import torch


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    pixels = torch.randn(96, 1, 14, 14, dtype=torch.float64)
    return evidence_data.Split(pixels, torch.randint(10, (96,)))


def both_losses(arm, images, **options):
    models = evidence_public.pair(arm, widths=(32, 48), **options)
    return [evidence_public.losses(*each, images, steps=6) for each in models]


@pytest.mark.parametrize("arm", evidence_public.ARMS)
def test_public_layers_have_the_same_losses(arm, images):
    ours, theirs = both_losses(arm, images)
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert ours[0] != pytest.approx(ours[-1], rel=0.01)


def test_the_papers_gradient_is_another_one(images):
    ours, theirs = both_losses("mwe", images, detach_max=True)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-9)
    assert ours[-1] != pytest.approx(theirs[-1], rel=1e-5)
