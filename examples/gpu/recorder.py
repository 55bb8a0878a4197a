"""Makes CUDA tensors without a GPU, and records the operations on them.

PyTorch's fake tensors have a device, a type and a shape, but no numbers. ``guard.cpp`` lets
autograd run over fake CUDA tensors in a PyTorch that was built without CUDA.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.onnx.operators
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_sffn.memory.selectors import base_layer

HERE = Path(__file__).parent
PRELOADED = "FAIRSEQ_SFFN_FAKE_CUDA"

WAITS_OF = {"base": 1}
"""Selector -> how often the host waits for the device in a layer. ``base`` assigns tokens on the
host. No other selector waits."""

KINDS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "fp64": (torch.float64, None),
    "autocast bf16": (torch.float32, torch.bfloat16),
    "autocast fp16": (torch.float32, torch.float16),
}
"""Name -> dtype of parameters and hidden states, and dtype of autocast."""

WAITS = ("nonzero", "masked_select", "bincount", "_unique2", "equal")
"""Operators whose result the host waits for."""

FAKED = (
    "is_available",
    "is_bf16_supported",
    "current_device",
    "get_rng_state",
    "set_rng_state",
)
"""Functions of ``torch.cuda`` that are answered without a GPU."""

VIEWS = (
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "chunk",
    "detach",
    "device",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "flatten",
    "lift_fresh",
    "narrow",
    "new_empty",
    "new_empty_strided",
    "permute",
    "prim_device",
    "reshape",
    "resize_",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unflatten",
    "unfold",
    "unsqueeze",
    "view",
)
"""Operators that start no kernel."""

OWN_KERNELS = {"gathered_products": 1, "scattered_products": 3, "table_products": 1}
"""Number of kernels that our operators start. fp32 sums are zeroed first and rounded last."""


def run_with_guard(arguments: list[str]) -> None:
    """Run this program again with the guard, unless it has the guard already.

    Raises:
        SystemExit: with the exit status of the second run, or because there is no C++ compiler.
    """
    if os.environ.get(PRELOADED):
        return
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, **compile_guard(Path(folder))}
        sys.exit(subprocess.run([sys.executable, *arguments], env=env).returncode)


def compile_guard(folder: Path) -> dict[str, str]:
    """Compile the guard, and return the environment variables of a program that has it.

    Raises:
        SystemExit: there is no C++ compiler.
    """
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        sys.exit("fake CUDA tensors need a C++ compiler (c++, or what CXX names)")
    torch_folder, library = Path(torch.__file__).parent, folder / "guard.so"
    command = [compiler, "-O1", "-std=c++20", "-fPIC", "-shared", "-w"]
    command += ["-isystem", torch_folder / "include", HERE / "guard.cpp", "-o", library]
    command += ["-L", torch_folder / "lib", "-lc10", "-ltorch_cpu"]
    subprocess.run([*command, f"-Wl,-rpath,{torch_folder}/lib"], check=True)
    return {PRELOADED: "1", "LD_PRELOAD": str(library)}


def leave(status: int) -> NoReturn:
    """End the program at once. Autograd has threads for a device that does not exist, and they
    would turn a normal end into an error."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Make all tensors fake, CUDA tensors included."""
    real = {name: getattr(torch.cuda, name) for name in FAKED}
    balanced_assignment = base_layer.balanced_assignment
    tensor, shape_as_tensor = torch.tensor, torch.onnx.operators.shape_as_tensor

    def fake_tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = tensor(data, *args, **kwargs)
        return made if device is None or torch.device(device).type == "cpu" else made.to(device)

    torch.cuda.is_available = lambda: False  # the mode would start CUDA otherwise
    mode = FakeTensorMode()
    try:
        with mode:
            torch.cuda.is_available = lambda: True
            torch.cuda.is_bf16_supported = lambda *args, **kwargs: True
            torch.cuda.current_device = lambda: 0
            torch.cuda.get_rng_state = lambda *args: None
            torch.cuda.set_rng_state = lambda *args: None
            torch.tensor = fake_tensor
            # On the host.
            base_layer.balanced_assignment = lambda scores, **_: scores.new_zeros(
                len(scores), dtype=torch.int64
            )
            torch.onnx.operators.shape_as_tensor = lambda x: list(x.shape)
            yield
    finally:
        for name, function in real.items():
            setattr(torch.cuda, name, function)
        base_layer.balanced_assignment = balanced_assignment
        torch.tensor, torch.onnx.operators.shape_as_tensor = tensor, shape_as_tensor


class Recorder(TorchDispatchMode):
    """Counts operations while it is active.

    Args:
        answer: value that reading a number returns.

    Attributes:
        waits: place where the host would wait for the device -> count.
        faults: operation that a GPU would refuse or compute block by block -> count.
        launches: operator -> least number of kernels that it starts on the device.
        bytes: bytes that kernels read and write, each operand once.
    """

    def __init__(self, answer: bool = True) -> None:
        super().__init__()
        self.answer = answer
        self.waits: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        inputs = _tensors((args, kwargs))
        devices = {tensor.device.type for tensor in inputs}
        if name == "_local_scalar_dense":
            self.waits[f"a number is read at {_where()}"] += 1
            kinds = {torch.bool: bool, **dict.fromkeys((torch.int64, torch.int32), int)}
            return kinds.get(args[0].dtype, float)(self.answer)
        if self._copies_to_device(name, kwargs, devices):
            if not kwargs.get("non_blocking"):
                self.waits[f"copy to the device at {_where()}"] += 1
            dtype = kwargs.get("dtype") or args[0].dtype
            return torch.empty(args[0].shape, dtype=dtype, device="cuda")
        if "cuda" in devices:
            self._look_for_waits(name, args, kwargs)
            # A number may be on the host.
            if any(tensor.device.type == "cpu" and tensor.dim() for tensor in inputs):
                self.faults[f"{name} of tensors on two devices at {_where()}"] += 1
        if name == "_grouped_mm" and "cuda" in devices:
            self.faults[f"grouped_mm, slow or refused on most cards, at {_where()}"] += 1
        result = func(*args, **kwargs)
        outputs = _tensors(result)
        if "cuda" in devices and any(tensor.device.type == "cpu" for tensor in outputs):
            self.waits[f"{name} gives a tensor on the host at {_where()}"] += 1
        on_device = "cuda" in devices or any(t.device.type == "cuda" for t in outputs)
        if on_device and name not in VIEWS:
            self.launches[name] += OWN_KERNELS.get(name, 1)
            self.bytes += bytes_of(name, inputs, outputs)
        return result

    @staticmethod
    def _copies_to_device(name: str, kwargs: dict[str, Any], devices: set[str]) -> bool:
        target = kwargs.get("device")
        return (
            name == "_to_copy"
            and devices == {"cpu"}
            and target is not None
            and torch.device(target).type == "cuda"
        )

    def _look_for_waits(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        if name in WAITS:
            self.waits[f"{name} at {_where()}"] += 1
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.waits[f"repeat_interleave of unknown size at {_where()}"] += 1
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [tensor for tensor in _tensors(args[1]) if tensor.dtype == torch.bool]
            if masks:
                self.waits[f"{name} by a mask at {_where()}"] += 1


@dataclass
class Outcome:
    """The result of a case.

    Attributes:
        most_launches: largest allowed number of kernels.
        allowed_waits: allowed number of waits.
        error: the exception, if one was raised.
        waits, faults: see :class:`Recorder`.
        fairseq_waits: waits in fairseq's own code.
        launches: number of kernels.
        bytes: bytes that kernels move.
    """

    name: str
    most_launches: int
    allowed_waits: int = 0
    error: str = ""
    waits: dict[str, int] = field(default_factory=dict)
    fairseq_waits: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    launches: int = 0
    bytes: int = 0

    def take(self, record: Recorder) -> None:
        """Add the counts of a recorder."""
        for where, number in record.waits.items():
            waits = self.fairseq_waits if " at fairseq/" in where else self.waits
            waits[where] = number
        self.launches = record.launches.total()
        self.faults |= record.faults
        self.bytes = record.bytes

    @property
    def problems(self) -> list[str]:
        """Return a line for each problem."""
        lines = [f"{self.name}: {self.error}"] if self.error else []
        if sum(self.waits.values()) > self.allowed_waits:
            lines += [f"{self.name}: waits {n} times: {what}" for what, n in self.waits.items()]
        lines += [f"{self.name}: {what} ({n} times)" for what, n in self.faults.items()]
        if self.launches > self.most_launches:
            lines.append(f"{self.name}: {self.launches} kernels, more than {self.most_launches}")
        return lines


def to_cuda(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Move a module to the fake device and its parameters and buffers to a dtype. A parameter that
    several modules share stays shared."""
    moved: dict[torch.Tensor, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if parameter not in moved:
                    new = torch.empty(parameter.shape, dtype=dtype, device="cuda")
                    moved[parameter] = torch.nn.Parameter(new)
                part._parameters[name] = moved[parameter]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                new = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
                part._buffers[name] = new
        # fairseq's sinusoidal positions are neither parameters nor buffers.
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                setattr(part, name, torch.empty(value.shape, dtype=dtype, device="cuda"))


def bytes_of(name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    """Return the least number of bytes that an operator moves."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in [*inputs, *outputs])
    if name not in OWN_KERNELS:
        return size
    # An operator reads or updates the row of a token once for each of its assignments.
    assignments = max(
        len(tensor) for tensor in inputs if tensor.dtype == torch.int32 and tensor.dim() == 1
    )
    if name == "scattered_products":
        tokens, width = outputs[0].shape
        sums = 4 * width * (assignments + 2 * tokens)  # zeroed, added to, rounded
        return size + sums
    rows = inputs[0] if name == "gathered_products" else inputs[1]
    return size + (assignments - len(rows)) * rows.shape[1] * rows.element_size()


def _tensors(nested: Any) -> list[torch.Tensor]:
    """Return the tensors among the arguments or results of an operator."""
    if isinstance(nested, torch.Tensor):
        return [nested]
    if isinstance(nested, dict):
        nested = nested.values()
    elif not isinstance(nested, (tuple, list)):
        return []
    return [tensor for each in nested for tensor in _tensors(each)]


def _where() -> str:
    """Return the calling line in this project or in fairseq, or else a word for the caller."""
    for frame in reversed(traceback.extract_stack()):
        for package in ("fairseq_sffn", "fairseq"):
            _, found, path = frame.filename.rpartition(f"/{package}/")
            if found:
                return f"{package}/{path}:{frame.lineno}"
    return "the backward pass"
