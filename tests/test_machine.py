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
