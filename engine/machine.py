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
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__  # torch goes on for a page
        raise errors.UserError(f"device {name!r} is not usable here: {reason}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def matmul_seconds(device: torch.device, dtype: torch.dtype, side: int, repeats: int = 7) -> float:
    """The best time of one side x side matrix product, in seconds."""
    a, seconds = torch.randn(side, side, device=device).to(dtype), []
    for _ in range(repeats):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for the device
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of a large matrix product here, in FLOP/s: what a training step's own is measured against (MFU)."""
    side = 8192 if device.type == "cuda" else 1024
    if device.type == "cpu" and matmul_seconds(device, dtype, 256, 3) > 0.005:
        side = 256  # a type that this processor has no instructions for: the large product would take seconds
    return 2 * side**3 / matmul_seconds(device, dtype, side)


def pick_precision(device: torch.device) -> torch.dtype:
    """bf16 on CUDA chips that have it, and on CPUs that multiply it clearly faster (AMX, AVX512-BF16); else fp32."""
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        rate = {dtype: peak_flops(device, dtype) for dtype in (torch.bfloat16, torch.float32)}
        faster = device.type == "cpu" and rate[torch.bfloat16] > 1.5 * rate[torch.float32]
    return torch.bfloat16 if faster else torch.float32


def allow_shapes(n: int) -> None:
    """Let torch.compile keep n versions of a function, one for each picture size, instead of 8."""
    config = torch._dynamo.config
    config.cache_size_limit = max(n, config.cache_size_limit)
    config.accumulated_cache_size_limit = max(4 * n, config.accumulated_cache_size_limit)


def compile_works(device: torch.device) -> tuple[bool, str]:
    """(whether torch.compile builds and runs a small function on `device`, why not).

    On CPUs it needs a C++ compiler and Python's headers, on CUDA Triton; the only sure way to know is to try.
    """
    if device.type == "mps":
        return False, "not tried on MPS"
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda a: (a.sin() * a).sum())(x).backward()
    except Exception as error:  # whatever the compiler raises: the answer is "no", and the caller prints it
        torch._dynamo.reset()
        return False, str(error).strip().splitlines()[0][:120]
    return True, ""


def keep_freed_memory() -> None:
    """Linux: let malloc keep freed blocks instead of handing them back to the kernel after every tensor.

    glibc maps each large tensor afresh, so every step pays for zeroed pages again.
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
        chip = f"{processor_name()}, {torch.get_num_threads()} threads{' and MPS' * (device.type == 'mps')}"
    return f"{chip}; torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"


def commit() -> str:
    """The commit this code is at, with "+" when a program differs from it; "unknown" outside a git clone."""

    def git(*words: str) -> str:
        options = dict(cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return subprocess.run(["git", *words], **options).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", ":/*.py")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
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
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
