"""Every random number of data, training and sampling but the first weights, as a function of what it is for.

    rng(seed, "noise", step, index).standard_normal((3, 32, 32))

A random number belongs to (seed, purpose, and integers such as the step and the global index of the sample), never to
a process. So one rank or eight, micro-batches of 4 or 64, a run in one piece or resumed ten times: each sample meets
the same noise, the same times, the same dropout. There is no generator state to save, and none to lose.

NumPy's Philox generator makes the numbers on the CPU, so they are the same on every device.
"""

import functools
import hashlib

import numpy as np
import torch
from torch import Tensor


@functools.cache
def number_of(purpose: str) -> int:
    """64 bits of the hash of a purpose's name."""
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")


def rng(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """A fresh generator that depends on (seed, purpose, *key) and on nothing else. All integers must be >= 0.

    Give one purpose keys of one length: a short key and the same key with zeros after it are one stream.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number_of(purpose), *key])))


def normal(seed: int, purpose: str, keys: list[tuple[int, ...]], shape: tuple[int, ...]) -> Tensor:
    """[len(keys), *shape] standard normal values in fp32; row i depends on (seed, purpose, *keys[i]) alone."""
    rows = [rng(seed, purpose, *key).standard_normal(shape, dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(rows))
