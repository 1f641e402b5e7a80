"""A sample of benchmarks/pretrained.py: what `init="preserve"` keeps of real models."""

import pytest
from pretrained import TOLERANCE, check

SAMPLE = (
    "timm:test_convnext",
    "timm:test_byobnet",
    "timm:test_nfnet",
    "timm:test_vit",
    "torchvision:raft_small",
    "torchvision:shufflenet_v2_x0_5",
)


@pytest.mark.parametrize("name", SAMPLE)
def test_the_outputs_stay_what_they_were_in_two_modes(name: str) -> None:
    row = check(name, modes=("lwe", "lwe+mwe"))
    assert not row.cause
    assert len(row.preserved) == 2
    assert max(row.preserved.values()) <= TOLERANCE
    assert row.redrawn is None or row.redrawn > 1e-3
