"""The machine under the run: device, precision, compiler and memory, each chosen by looking, each printed.

device = machine.pick_device("auto")
precision = machine.pick_precision(device)          # torch.bfloat16 where it is faster, else torch.float32
works, why = machine.compile_works(device)          # whether torch.compile can build code here
machine.provenance(device)                          # what a result file says of where it comes from
"""

import ctypes
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from engine import errors


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes CUDA (this process's LOCAL_RANK), then Apple MPS, then the CPU.

    Raises UserError when the named device does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise errors.UserError(f"device {name!r} is not usable here: {reason}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def matmul_seconds(device: torch.device, dtype: torch.dtype, side: int = 768, repeats: int = 5) -> float:
    """The best time of one side x side matrix product, in seconds."""
    a = torch.randn(side, side, device=device).to(dtype)
    best = float("inf")
    for _ in range(repeats + 2):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for the device
        best = min(best, time.perf_counter() - start)
    return best


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of a large matrix product here, in FLOP/s: what a training
    step's own rate is measured against (MFU)."""
    side = 8192 if device.type == "cuda" else 1024
    if device.type == "cpu" and matmul_seconds(device, dtype, 256, 1) > 0.005:
        side = 256  # a type that this processor has no instructions for: the large product would take seconds
    return 2 * side**3 / matmul_seconds(device, dtype, side)


def allow_shapes(n: int) -> None:
    """Let torch.compile keep n versions of a function, one for each picture
    size it meets, instead of giving up after 8."""
    config = torch._dynamo.config
    # Its name before torch 2.6
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, max(n, getattr(config, name)))
    name = f"accumulated_{name}"
    setattr(config, name, max(4 * n, getattr(config, name)))


def pick_precision(device: torch.device) -> torch.dtype:
    """bf16 on CUDA chips that have it, and on CPUs whose bf16 matrix product is
    clearly faster (AMX, AVX512-BF16); else fp32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type != "cpu":
        return torch.float32
    small = {dtype: matmul_seconds(device, dtype, 256, 1) for dtype in (torch.bfloat16, torch.float32)}
    if small[torch.bfloat16] > 4 * small[torch.float32]:
        return torch.float32  # no instructions for it: the large product would take many seconds
    large = {dtype: matmul_seconds(device, dtype) for dtype in small}
    return torch.bfloat16 if 1.5 * large[torch.bfloat16] < large[torch.float32] else torch.float32


def compile_works(device: torch.device) -> tuple[bool, str]:
    """(whether torch.compile builds and runs a small function on `device`, why not).

    On CPUs it needs a C++ compiler and Python's headers, on CUDA Triton; the only sure way to know is to try.
    """
    if device.type == "mps":
        return False, "not tried on MPS"
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda a: (a.sin() * a).sum())(x).backward()
    except (
        Exception
    ) as error:  # whatever the compiler stack raises, the answer is "no", and the caller prints it
        torch._dynamo.reset()
        return False, str(error).strip().splitlines()[0][:120]
    return True, ""


def keep_freed_memory() -> None:
    """Linux: let malloc keep freed blocks instead of handing them back to the kernel after every tensor.

    glibc maps each large tensor afresh and unmaps it when it is freed, so every step pays for zeroed pages again.
    Keeping them made a training step of the laptop model about three times faster in eager mode. Does nothing
    elsewhere.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 * 2**20)


def describe(device: torch.device) -> str:
    """One line for logs and result files: the chip, its cores or memory, and the versions."""
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        chip = f"{torch.cuda.device_count()} x {p.name}, {p.total_memory / 2**30:.0f} GiB"
    else:
        chip = f"{processor_name()}, {torch.get_num_threads()} threads" + (
            " and MPS" if device.type == "mps" else ""
        )
    return f"{chip}; torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"


def commit() -> str:
    """The commit this code is at, with "+" when a program differs from it; "unknown" outside a git clone."""
    here = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + (
            "+" if git("status", "--porcelain", "-uno", "--", "*.py") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance(device: torch.device) -> dict[str, str]:
    """What every result file says of where it comes from."""
    program, here = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parents[1]
    name = str(program.relative_to(here) if program.is_relative_to(here) else program.name)
    if "/" in name:  # in a folder: started as a module
        name = "-m " + name.removesuffix(".py").replace("/", ".")
    return {
        "command": " ".join(["python", name, *sys.argv[1:]]),
        "commit": commit(),
        "hardware": describe(device),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def processor_name() -> str:
    """The processor's name as the operating system gives it."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
