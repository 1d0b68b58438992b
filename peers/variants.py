"""Departures from Self-E that are tried beside it, for toy/ and for tables: losses.SelfE with something exchanged.

    loss = variants.Variant(network, ema, lam_scale=0.25)     # takes the place of losses.SelfE, same call, same return

They ask how much of the data the half with s < t keeps, and what the paper leaves open about the null prompt.
"""

import torch
from torch import Tensor

import losses


class Variant(losses.SelfE):
    """losses.SelfE with these choices; each default is losses.SelfE itself.

    lam_scale      multiplies lambda
    lam_time       the second time that lambda sees: "s", or the "middle" of t and s
    null_target    what a null prompt learns at s < t without the auxiliary term (SILENCES.md, row 4):
                   "data"     x0
                   "renorm"   Eq. 19 with Delta = 0
                   "literal"  Eq. 19 with the answer of the EMA minus that of the trained network, as for any prompt
    """

    def __init__(self, network, ema, *, lam_scale=1.0, lam_time="s", null_target="data", **choices):
        super().__init__(network, ema, **choices)
        self.lam_scale, self.lam_time, self.null_target = lam_scale, lam_time, null_target

    def evaluate(self, x_s_hat: Tensor, s: Tensor, c: tuple, null: tuple, is_null: Tensor) -> tuple:
        nowhere = torch.zeros_like(is_null)
        return super().evaluate(x_s_hat, s, c, null, nowhere if self.null_target == "literal" else is_null)

    def weigh(self, t: Tensor, s: Tensor, is_null: Tensor, aux: bool) -> Tensor:
        second = (t + s) / 2 if self.lam_time == "middle" else s
        lam = self.lam_scale * losses.lam(t, second)
        return torch.where(is_null, 0.0, lam) if self.null_target == "data" and not aux else lam
