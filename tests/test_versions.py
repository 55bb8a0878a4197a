"""An old PyTorch is refused with a message."""

import pytest
import torch
from torch.torch_version import TorchVersion

from fairseq_sffn import versions


@pytest.mark.parametrize("version", ["2.9.0", "2.10.1+cu130", "2.15.0a0+git1234", "3.0.0"])
def test_supported(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    versions.check()


def test_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.8.0+cpu"))
    with pytest.raises(
        ImportError, match=r"^fairseq_sffn needs PyTorch 2\.9 or newer: this is 2\.8\.0"
    ):
        versions.check()
