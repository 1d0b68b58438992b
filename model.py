"""The network of Self-E: a FLUX-style transformer with two times (Sec. 3, S.2 "Architecture").

    import model
    V = model.Denoiser(**model.SIZES["laptop"])        # v = V(x_t, t, s, txt, vec)
    x0_hat = losses.G(V, x_t, t, s, (txt, vec))        # Eq. 6

Symbols, as in the paper
    x_t     [B, C, H, W]  noisy picture or latent, x_t = (1 - t) x0 + t eps                      Eq. 1
    t, s    [B]           times in [0, 1], s <= t; t = 0 is data, t = 1 is noise                 Sec. 2, 3
    txt     [B, L, d_txt] token states of a frozen text encoder                                  S.2 (c)
    vec     [B, d_vec]    its pooled vector (CLIP's, for the big sizes)                          S.2 (c)
    V       [B, C, H, W]  the network's output, a velocity (eps - x0 where s = t)                Eq. 6
    d       the model width; h heads of size d / h

One embedder is added to FLUX: `gap_in`, whose input is t - s (Eq. s.9). Parameters are named as in FLUX, so only
`gap_in.*` is missing in the weights of a FLUX of the same dimensions. At s = t the input is 0. Flow matching trains
with s = t alone: its `gap_in` has seen no other input, and its models must be sampled at s_k = t_k.
"""

import functools
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# The numbers of `0.5b` and `2b` are from S.2 (a)-(d); `laptop` and `0.1b` are ours. `double` and `single` count the
# blocks; `axes` are the RoPE dimensions over (frame, y, x) and sum to the head size d / heads. `patch` is the side of a
# patch, so a token holds channels * patch^2 values: 16 * 2^2 = 64 for FLUX latents. V has to carry a token's noise
# through the width, so width must exceed that number; 8 x 8 RGB patches (192 values) are too many for width 128.
FLUX = dict(double=8, single=16, channels=16, patch=2, txt_dim=4096, vec_dim=768)
PIXELS = dict(double=2, single=4, channels=3, patch=4, txt_dim=256, vec_dim=256)
SIZES = {
    "laptop": dict(width=128, heads=4, axes=(8, 12, 12)) | PIXELS,
    "0.1b": dict(width=512, heads=8, axes=(8, 28, 28)) | FLUX | dict(double=6, single=12),
    "0.5b": dict(width=1024, heads=16, axes=(8, 28, 28)) | FLUX,
    "2b": dict(width=2048, heads=16, axes=(16, 56, 56)) | FLUX,
}


# ------------------------------------------------------------------------------------------------------------
# Eq. s.9    e_t = MLP_t(Sinusoid(t)),   e_s = MLP_s(Sinusoid(t - s)): the features here, the MLPs in Denoiser.forward
# ------------------------------------------------------------------------------------------------------------
def sinusoid(t: Tensor, features: int = 256, max_period: float = 10000.0, factor: float = 1000.0) -> Tensor:
    """[B] times in [0, 1] -> [B, features]: cos then sin of factor * t at geometrically spaced frequencies, in fp32.

    FLUX's factor of 1000 makes the fastest features oscillate within 0.006 of t. A network on top of them has a time
    derivative that is mostly such oscillation. Objectives that learn from how it changes in time (peers/) take the
    factor 1.
    """
    half = features // 2
    frequencies = torch.exp(
        -torch.log(torch.tensor(max_period)) * torch.arange(half, dtype=torch.float32) / half
    )
    angles = factor * t.float()[:, None] * frequencies.to(t.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Embedder(nn.Module):
    """Linear, SiLU, Linear: the small MLP that turns time features or the pooled text vector into width d."""

    def __init__(self, dim_in: int, width: int):
        super().__init__()
        self.in_layer = nn.Linear(dim_in, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


# ------------------------------------------------------------------------------------------------------------
# Rotary positions over (frame, y, x), S.2's (t, y, x): text tokens sit at the origin, image tokens at (0, y, x)
# ------------------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=64)
def rope_table(txt_len: int, rows: int, cols: int, axes: tuple, device: torch.device) -> Tensor:
    """[2, txt_len + rows * cols, sum(axes) / 2]: cosines and sines of each token's rotation angles (theta = 10000).

    The angles are computed in float64 on the CPU, because not every device has float64, and kept per picture size.
    """
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    position = torch.stack([torch.zeros_like(x), y, x], dim=-1).reshape(-1, 3)  # [rows * cols, 3]
    # Text first, as in the attention
    position = torch.cat([position.new_zeros(txt_len, 3), position]).double()
    angles = [
        position[:, i : i + 1] * 10000.0 ** (-torch.arange(0, n, 2).double() / n) for i, n in enumerate(axes)
    ]
    angles = torch.cat(angles, dim=-1)
    with torch.inference_mode(False):  # a table made while sampling must serve a later training step too
        return torch.stack([angles.cos(), angles.sin()]).float().to(device)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn each interleaved pair of x [B, h, N, d/h] by its token's angle, in fp32.

    The product of complex numbers, written in real ones: torch.compile fuses these and leaves complex products alone.
    """
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, h, N, d/2h] each
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1).flatten(-2)


# ------------------------------------------------------------------------------------------------------------
# The blocks of FLUX
# ------------------------------------------------------------------------------------------------------------
class GELU(nn.Module):
    """GELU in its tanh form, 0.5 x (1 + tanh u) with u = sqrt(2 / pi) (x + 0.044715 x^3)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # 0.5 (1 + tanh u) is sigmoid(2 u), which compiles to faster code
            y = x.float()
            return (y * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))).to(x.dtype)
        return F.gelu(x, approximate="tanh")


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last dimension, eps 1e-6."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.scale.to(x.dtype), eps=1e-6)


class QKNorm(nn.Module):
    """Per-head RMSNorm of queries and keys; `attention` rotates them by position."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


class Modulation(nn.Module):
    """vec [B, d] -> n tensors [B, 1, d]: the shifts, scales and gates of adaLN, all zero at initialisation."""

    def __init__(self, width: int, n: int):
        super().__init__()
        self.n = n
        self.lin = nn.Linear(width, n * width)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None, :].chunk(self.n, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without learned parameters (eps 1e-6), then x (1 + scale) + shift. x [B, N, d]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def attention(q: Tensor, k: Tensor, v: Tensor, rope: Tensor) -> Tensor:
    """Full attention over all tokens, [B, h, N, d/h] each -> [B, N, d]."""
    q, k = rotate(q, rope).to(v.dtype), rotate(k, rope).to(v.dtype)
    if q.device.type == "cpu":
        # For the few tokens of small pictures, plain products beat torch's fused kernel
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        out = scores.float().softmax(dim=-1).to(v.dtype) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return rearrange(out, "b h n c -> b n (h c)")


class SelfAttention(nn.Module):
    """The projections of one stream; the attention itself is joint over both streams."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = QKNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "b n (three h c) -> three b h n c", three=3, h=self.heads).unbind(0)
        return *self.norm(q, k), v


class DoubleBlock(nn.Module):
    """Text and image keep separate weights and meet in one joint attention (text first)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.img_mod = Modulation(width, 6)
        self.img_attn = SelfAttention(width, heads)
        self.img_mlp = nn.Sequential(nn.Linear(width, 4 * width), GELU(), nn.Linear(4 * width, width))
        self.txt_mod = Modulation(width, 6)
        self.txt_attn = SelfAttention(width, heads)
        self.txt_mlp = nn.Sequential(nn.Linear(width, 4 * width), GELU(), nn.Linear(4 * width, width))

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        img_q, img_k, img_v = self.img_attn.project(modulate(img, img_shift1, img_scale1))
        txt_q, txt_k, txt_v = self.txt_attn.project(modulate(txt, txt_shift1, txt_scale1))
        q, k, v = (torch.cat(pair, dim=2) for pair in ((txt_q, img_q), (txt_k, img_k), (txt_v, img_v)))
        txt_out, img_out = attention(q, k, v, rope).split([txt.shape[1], img.shape[1]], dim=1)

        img = img + img_gate1 * self.img_attn.proj(img_out)
        img = img + img_gate2 * self.img_mlp(modulate(img, img_shift2, img_scale2))
        txt = txt + txt_gate1 * self.txt_attn.proj(txt_out)
        txt = txt + txt_gate2 * self.txt_mlp(modulate(txt, txt_shift2, txt_scale2))
        return img, txt


class SingleBlock(nn.Module):
    """One stream of text and image tokens; attention and MLP run side by side and share their two linears."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.modulation = Modulation(width, 3)
        self.linear1 = nn.Linear(width, 3 * width + 4 * width)
        self.norm = QKNorm(width // heads)
        self.gelu = GELU()
        self.linear2 = nn.Linear(width + 4 * width, width)

    def forward(self, x: Tensor, vec: Tensor, rope: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        d = x.shape[-1]
        qkv, mlp = self.linear1(modulate(x, shift, scale)).split([3 * d, 4 * d], dim=-1)
        q, k, v = rearrange(qkv, "b n (three h c) -> three b h n c", three=3, h=self.heads).unbind(0)
        out = attention(*self.norm(q, k), v, rope)
        return x + gate * self.linear2(torch.cat([out, self.gelu(mlp)], dim=-1))


class FinalLayer(nn.Module):
    """LayerNorm, (shift, scale) from vec, Linear to the values of a patch; zero at initialisation."""

    def __init__(self, width: int, patch_values: int):
        super().__init__()
        self.linear = nn.Linear(width, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


# ------------------------------------------------------------------------------------------------------------
# The denoiser
# ------------------------------------------------------------------------------------------------------------
class Denoiser(nn.Module):
    """V_theta(x_t, t, s, c), S.2 (d). The keyword arguments are the columns of `SIZES`.

    `time_factor` is that of `sinusoid`. `precision` is the dtype of the network's inside (torch.bfloat16 runs it under
    autocast). Time features and embedders are computed in fp32 whatever it is; input and output are passed in fp32 and
    rounded inside, by the first and the last linear layer. Call the network outside any autocast of your own.
    """

    def __init__(
        self,
        width,
        heads,
        double,
        single,
        axes,
        channels,
        patch,
        txt_dim,
        vec_dim,
        precision=torch.float32,
        time_factor=1000.0,
    ):
        super().__init__()
        if len(axes) != 3 or sum(axes) * heads != width or any(n % 2 for n in axes):
            raise ValueError(
                f"RoPE axes {axes} must be three even numbers that sum to the head size {width} / {heads}"
            )
        self.axes, self.patch, self.precision = tuple(axes), patch, precision
        self.time_factor = time_factor
        # The first so many blocks keep no activations: the backward pass computes them again
        self.recompute = 0
        self.img_in = nn.Linear(channels * patch**2, width)
        self.txt_in = nn.Linear(txt_dim, width)
        self.time_in = Embedder(256, width)
        self.gap_in = Embedder(256, width)
        self.vector_in = Embedder(vec_dim, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(width, heads) for _ in range(double))
        self.single_blocks = nn.ModuleList(SingleBlock(width, heads) for _ in range(single))
        self.final_layer = FinalLayer(width, channels * patch**2)
        self.initialise()

    def initialise(self) -> None:
        """DiT's initialisation, since FLUX publishes none: Xavier linears, zero biases, every gate and the output zero.

        DiT draws embedders from N(0, 0.02). At width 2048 that is Xavier's own 0.02 to 0.03. At width 128 it is a
        quarter of Xavier's, and time and prompt would reach the blocks too weakly at first.
        """
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.constant_(p, 1.0 if name.endswith("norm.scale") else 0.0)
            elif ".lin." in name or name.startswith("final_layer"):
                nn.init.zeros_(p)
            else:
                nn.init.xavier_uniform_(p)

    def tokens(self, x: Tensor) -> int:
        """Patches of each picture in a batch [B, C, H, W]."""
        return x.shape[2] * x.shape[3] // self.patch**2

    def compile_blocks(self) -> None:
        """torch.compile each block by itself: one block's code serves all blocks of its kind."""
        for block in [*self.double_blocks, *self.single_blocks]:
            block.compile(dynamic=False)

    def run(self, number: int, block: nn.Module, *x: Tensor):
        """Block `number` of all blocks on its inputs, with or without keeping its activations."""
        if number < self.recompute and torch.is_grad_enabled():
            # Nothing random is in a block
            return checkpoint(block, *x, use_reentrant=False, preserve_rng_state=False)
        return block(*x)

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor, txt: Tensor, vec: Tensor) -> Tensor:
        """x_t [B, C, H, W], t and s [B], txt [B, L, d_txt], vec [B, d_vec] -> V [B, C, H, W] in fp32 (Eq. 6).

        H and W must be multiples of the patch side. Eq. s.9 and s.10 are the lines that make `e`.
        """
        p, rows, cols = self.patch, x_t.shape[2] // self.patch, x_t.shape[3] // self.patch
        with torch.autocast(x_t.device.type, enabled=False):  # in fp32, whatever the caller's context says
            # Eq. s.9
            e_t = self.time_in(sinusoid(t, factor=self.time_factor))  # [B, d]
            e_s = self.gap_in(sinusoid(t - s, factor=self.time_factor))
            # Eq. s.10: the combined embedding stands wherever FLUX has e_t
            e = e_t + e_s
            vec = e + self.vector_in(vec.float())  # [B, d] from here on, with the pooled text in it
        rope = rope_table(txt.shape[1], rows, cols, self.axes, x_t.device)

        # Autocast begins and ends inside this call. Its cache of cast weights therefore never outlives one forward
        # pass, so a pass without gradient cannot leave casts without gradient behind for the pass that needs them
        # (pytorch issue 112583).
        with torch.autocast(x_t.device.type, self.precision, enabled=self.precision != torch.float32):
            # img [B, rows * cols, d]: a token per patch
            img = self.img_in(rearrange(x_t, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=p, pw=p))
            txt = self.txt_in(txt)  # [B, L, d]
            for i, block in enumerate(self.double_blocks):
                img, txt = self.run(i, block, img, txt, vec, rope)
            x = torch.cat([txt, img], dim=1)  # [B, L + rows * cols, d]
            for i, block in enumerate(self.single_blocks, start=len(self.double_blocks)):
                x = self.run(i, block, x, vec, rope)
            img = self.final_layer(x[:, txt.shape[1] :], vec)
        return rearrange(img.float(), "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=rows, w=cols, ph=p, pw=p)


def count_parameters(size: dict) -> int:
    """The parameters of a Denoiser, from the entries of `SIZES`; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in Denoiser(**size).parameters())
