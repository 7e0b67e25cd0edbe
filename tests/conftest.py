"""What every test runs under: no network, no W&B; and the tiny backbones as fixtures."""

import os

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from models import ARCHITECTURES, tiny


@pytest.fixture(params=sorted(ARCHITECTURES))
def backbone(request):
    """A tiny model of each supported architecture."""
    return tiny(request.param)


@pytest.fixture(params=sorted(ARCHITECTURES))
def deep_backbone(request):
    """The same with twelve blocks, where many routes lie close together."""
    return tiny(request.param, blocks=12)
