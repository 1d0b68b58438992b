"""The machine's choices: devices, precision, compiler."""

import pytest
import torch

from engine import errors, machine


def test_devices():
    assert machine.pick_device("cpu") == torch.device("cpu")
    assert machine.pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("abacus", "cuda:99"):
        with pytest.raises(errors.UserError, match=name):
            machine.pick_device(name)


@pytest.mark.parametrize(
    "small, large, expected",
    [
        ((1, 1), (1, 2), torch.bfloat16),
        ((1, 1), (1, 1.2), torch.float32),
        ((3, 1), (1, 4), torch.bfloat16),
        ((100, 1), None, torch.float32),
    ],
)
def test_the_faster_precision_is_picked(small, large, expected, monkeypatch):
    """bf16 where its large product is clearly faster; a type without instructions is seen by a small product alone."""
    times = {256: small, 768: large}

    def seconds(device, dtype, side=768, repeats=5):
        return times[side][dtype is torch.float32]

    monkeypatch.setattr(machine, "matmul_seconds", seconds)
    assert machine.pick_precision(torch.device("cpu")) is expected


def test_kept_memory_changes_no_result():
    a = torch.randn(64, 64)
    before = a @ a
    machine.keep_freed_memory()
    assert torch.equal(before, a @ a)
