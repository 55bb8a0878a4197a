"""Half precision where there is no GPU."""

from types import SimpleNamespace

import pytest
import torch

from fairseq_sffn.errors import UsageError
from fairseq_sffn.precision import check_precision


@pytest.mark.parametrize("flag", ["fp16", "bf16", "amp"])
def test_half_precision_needs_a_gpu(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    common = SimpleNamespace(cpu=True, fp16=False, bf16=False, amp=False)
    flags = ("fp16", "bf16", "amp")
    check_precision(common, flags)
    setattr(common, flag, True)
    with pytest.raises(UsageError, match=f"--{flag}: needs a GPU"):
        check_precision(common, flags)
    check_precision(common, tuple(other for other in flags if other != flag))
    common.cpu = False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=f"--{flag}: needs a GPU"):
        check_precision(common, flags)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_precision(common, flags)
