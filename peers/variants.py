"""Departures from Self-E that are tried beside it, for toy/ and for tables: losses.SelfE with something exchanged.

    loss = variants.Variant(network, ema, lam_scale=0.25)     # takes the place of losses.SelfE, same call, same return

They ask how much of the data the half with s < t keeps, and what the paper leaves open about the null prompt.
"""

import torch
from torch import Tensor

import losses

LAM_TIMES = {  # the second time that lambda sees, as a function of (t, s)
    "s": lambda t, s: s,  # the paper
    "middle": lambda t, s: (t + s) / 2,
}
NULL_TARGETS = ("data", "renorm", "literal")


class Variant(losses.SelfE):
    """losses.SelfE with these choices; each default is losses.SelfE itself.

    lam_scale      multiplies lambda
    lam_time       the second time that lambda sees: a key of LAM_TIMES, or a function of (t, s)
    null_target    what a null prompt learns at s < t without the auxiliary term (SILENCES.md, row 4):
                   "data"     x0
                   "renorm"   Eq. 19 with Delta = 0
                   "literal"  Eq. 19 with the answer of the EMA minus that of the trained network, as for any prompt
    """

    def __init__(self, network, ema, *, lam_scale=1.0, lam_time="s", null_target="data", **choices):
        super().__init__(network, ema, **choices)
        if null_target not in NULL_TARGETS:
            raise ValueError(f"unknown null_target {null_target!r}; there are {', '.join(NULL_TARGETS)}")
        self.lam_scale, self.null_target = lam_scale, null_target
        self.lam_time = LAM_TIMES.get(lam_time, lam_time)

    def evaluate(self, x_s_hat: Tensor, s: Tensor, c: tuple, null: tuple, is_null: Tensor) -> tuple:
        nowhere = torch.zeros_like(is_null)
        return super().evaluate(x_s_hat, s, c, null, nowhere if self.null_target == "literal" else is_null)

    def weigh(self, t: Tensor, s: Tensor, is_null: Tensor, aux: bool) -> Tensor:
        lam = self.lam_scale * losses.lam(t, self.lam_time(t, s))
        return torch.where(is_null, 0.0, lam) if self.null_target == "data" and not aux else lam
