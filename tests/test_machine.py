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


@pytest.mark.parametrize("rate, picked", [(2.0, torch.bfloat16), (1.2, torch.float32), (0.01, torch.float32)])
def test_the_faster_precision_is_picked(rate, picked, monkeypatch):
    monkeypatch.setattr(machine, "peak_flops", lambda _, dtype: rate if dtype is torch.bfloat16 else 1.0)
    assert machine.pick_precision(torch.device("cpu")) is picked


def test_a_type_without_instructions_is_measured_by_a_small_product(monkeypatch):
    """The large one would take many seconds."""
    monkeypatch.setattr(machine, "matmul_seconds", lambda device, dtype, side, repeats=7: side**3 / 1e9)
    assert machine.peak_flops(torch.device("cpu"), torch.bfloat16) == pytest.approx(2e9)
    sides = []
    monkeypatch.setattr(machine, "matmul_seconds", lambda *a: sides.append(a[2]) or 1.0)
    machine.peak_flops(torch.device("cpu"), torch.bfloat16)
    assert max(sides) == 256
