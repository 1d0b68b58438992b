"""model.py against hand-counted parameters, numpy's sinusoid, torch's unfold and the FLUX transformer of diffusers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses
import model

# Same structure as the big sizes (two streams, then one; heads; three RoPE axes; patches), small enough for a test.
SMALL = dict(
    width=64, heads=4, double=2, single=3, axes=(4, 6, 6), channels=3, patch=2, txt_dim=24, vec_dim=10
)
OTHER = dict(
    width=48, heads=2, double=1, single=2, axes=(8, 4, 12), channels=5, patch=1, txt_dim=7, vec_dim=9
)
DEEP = dict(SMALL, double=8, single=16)


def away_from_zero(config: dict, seed: int = 0, **options) -> model.Denoiser:
    """A Denoiser in which no gate, bias or norm scale is at its initial zero or one, so that every path counts."""
    network = model.Denoiser(**config, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 2:
                p.copy_(noise / math.sqrt(p.shape[1]))
            else:
                p.copy_(0.3 * noise + (1.0 if name.endswith("norm.scale") else 0.0))
    return network


def inputs(config: dict, rows: int = 6, cols: int = 4, txt_len: int = 5, batch: int = 3, seed: int = 1):
    """x_t, t, s, txt, vec for pictures of rows x cols patches; not square, so that y and x cannot be confused."""
    generator = torch.Generator().manual_seed(seed)
    p = config["patch"]
    x_t = torch.randn(batch, config["channels"], rows * p, cols * p, generator=generator)
    t = torch.tensor([0.9, 0.35, 0.02, 1.0])[:batch]
    s = torch.tensor([0.4, 0.35, 0.0, 0.1])[:batch]
    txt = torch.randn(batch, txt_len, config["txt_dim"], generator=generator)
    return x_t, t, s, txt, torch.randn(batch, config["vec_dim"], generator=generator)


# --- sizes -----------------------------------------------------------------------------------------------------------
def count_by_hand(**size) -> tuple[int, int]:
    """(parameters of the blocks, all parameters), from the architecture on paper."""
    d, head = size["width"], size["width"] // size["heads"]

    def linear(n, m):
        return n * m + m

    stream = (
        linear(d, 6 * d) + linear(d, 3 * d) + linear(d, d) + linear(d, 4 * d) + linear(4 * d, d) + 2 * head
    )
    one = linear(d, 3 * d) + linear(d, 7 * d) + linear(5 * d, d) + 2 * head
    blocks = size["double"] * 2 * stream + size["single"] * one
    patch_values = size["channels"] * size["patch"] ** 2
    around = linear(patch_values, d) + linear(size["txt_dim"], d) + linear(d, 2 * d) + linear(d, patch_values)
    embedders = 2 * (linear(256, d) + linear(d, d)) + linear(size["vec_dim"], d) + linear(d, d)
    return blocks, blocks + around + embedders


@pytest.mark.parametrize("size", model.SIZES)
def test_parameter_count_equals_the_count_by_hand(size):
    with torch.device("meta"):
        network = model.Denoiser(**model.SIZES[size])
    blocks = sum(p.numel() for name, p in network.named_parameters() if "_blocks." in name)
    total = sum(p.numel() for p in network.parameters())
    assert (blocks, total) == count_by_hand(**model.SIZES[size])


@pytest.mark.parametrize("size, billions, total", [("0.5b", 0.55, 0.55e9), ("2b", 2.21, 2.2e9)])
def test_the_big_sizes_have_the_parameters_of_the_paper(size, billions, total):
    with torch.device("meta"):
        network = model.Denoiser(**model.SIZES[size])
    d = model.SIZES[size]["width"]
    matrices = sum(p.numel() for name, p in network.named_parameters() if "_blocks." in name and p.dim() == 2)
    assert matrices == 528 * d**2  # 8 x 36 d^2 + 16 x 15 d^2
    assert round(matrices / 1e9, 2) == billions
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(total, rel=0.03)


@pytest.mark.parametrize("size", model.SIZES)
def test_width_exceeds_the_values_of_a_token(size):
    """V has to carry the noise of a whole patch through the width."""
    numbers = model.SIZES[size]
    assert numbers["width"] > numbers["channels"] * numbers["patch"] ** 2


def test_axes_must_sum_to_the_head_size():
    with pytest.raises(ValueError, match="head size"):
        model.Denoiser(**dict(SMALL, axes=(4, 6, 8)))


# --- Eq. 6 -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(2,), (3, 4, 5), (2, 1, 3, 2)])
def test_the_sample_head_inverts_the_noising(shape):
    """With the true velocity eps - x0, G returns x0 from x_t = (1 - t) x0 + t eps, at every t."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, *shape, generator=generator, dtype=torch.float64)
    t, s = torch.tensor([1.0, 0.7, 0.1, 0.0]).double(), torch.tensor([0.2, 0.7, 0.0, 0.0]).double()
    x_t = torch.stack([(1 - ti) * a + ti * b for ti, a, b in zip(t, x0, eps)])
    seen = []

    def V(x, t_in, s_in, *cond):
        seen.append((t_in, s_in, cond))
        return eps - x0

    torch.testing.assert_close(losses.G(V, x_t, t, s, ("c", "d")), x0, rtol=0, atol=1e-14)
    assert seen[0][0] is t and seen[0][1] is s and seen[0][2] == ("c", "d")


# --- Eq. s.9, s.10 ---------------------------------------------------------------------------------------------------
def sinusoid_by_numpy(t: np.ndarray, features: int = 256) -> np.ndarray:
    """cos and sin of 1000 t / 10000^(i / 128), in float64."""
    angles = np.outer(1000.0 * t, 10000.0 ** (-np.arange(features // 2) / (features // 2)))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


# 1000 rad in fp32 are known to about 1e-4; in bf16 only to about 2 rad.
FP32_ANGLE = 2e-4


def test_sinusoid_equals_numpy_in_float64():
    t = torch.linspace(0, 1, 101)
    features = model.sinusoid(t)
    assert features.shape == (101, 256) and features.dtype == torch.float32
    np.testing.assert_allclose(features, sinusoid_by_numpy(t.double().numpy()), atol=FP32_ANGLE)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_two_embedders_see_t_and_the_gap_in_fp32(precision):
    """Eq. s.9 with the network's inside in fp32 and in bf16: time_in reads t, gap_in reads t - s, in full precision."""
    network = away_from_zero(SMALL, precision=precision)
    seen = {}
    for name in ("time_in", "gap_in"):
        embedder = getattr(network, name)
        embedder.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
    x_t, _, _, txt, vec = inputs(SMALL)
    t, s = torch.tensor([0.8, 0.6543, 1.0]), torch.tensor([0.5, 0.6542, 0.0])
    with torch.no_grad():
        network(x_t, t, s, txt, vec)
    for name, time in [("time_in", t.double()), ("gap_in", t.double() - s.double())]:
        features, embedded = seen[name]
        assert features.dtype == embedded.dtype == torch.float32
        np.testing.assert_allclose(features, sinusoid_by_numpy(time.numpy()), atol=FP32_ANGLE)


@pytest.mark.parametrize("pair", [((0.8, 0.5), (0.6, 0.3)), ((0.75, 0.5), (0.5, 0.25))])
def test_the_second_input_is_the_gap_and_nothing_else(pair):
    """With time_in zeroed V(x, .8, .5) = V(x, .6, .3), but not V(x, .8, .3). The second pair is free of rounding."""
    network = away_from_zero(SMALL)
    x_t, _, _, txt, vec = inputs(SMALL)

    def V(t, s):
        with torch.no_grad():
            return network(x_t, torch.full((3,), t), torch.full((3,), s), txt, vec)

    (t, s), (t_other, s_other) = pair
    assert (V(t, s) - V(t_other, s_other)).abs().max() > 0.05  # before: t itself counts
    with torch.no_grad():
        for p in network.time_in.parameters():
            p.zero_()
    torch.testing.assert_close(V(t, s), V(t_other, s_other), rtol=0, atol=5e-4 if t == 0.8 else 0)
    assert (V(t, s) - V(t, s_other)).abs().max() > 0.05
    with torch.no_grad():
        for p in network.gap_in.parameters():
            p.zero_()
    assert torch.equal(V(t, s), V(t, s_other))  # without gap_in, s is read nowhere


# --- patches ---------------------------------------------------------------------------------------------------------
def test_patches_are_those_of_unfold():
    """A Denoiser reduced to img_in and final_layer is a per-patch linear map; torch's unfold and fold say which."""
    network = away_from_zero(dict(SMALL, double=0, single=0))
    x_t, t, s, txt, vec = inputs(SMALL, rows=3, cols=5)
    with torch.no_grad():
        out = network(x_t, t, s, txt, vec)
        tokens = F.unfold(x_t, kernel_size=2, stride=2).transpose(
            1, 2
        )  # [B, 15, 3 * 2 * 2], (c, ph, pw), row by row
        hidden = F.linear(tokens, network.img_in.weight, network.img_in.bias)
        times = [
            network.time_in(model.sinusoid(t)),
            network.gap_in(model.sinusoid(t - s)),
            network.vector_in(vec),
        ]
        expected = network.final_layer(hidden, sum(times)).transpose(1, 2)
        expected = F.fold(expected, output_size=x_t.shape[2:], kernel_size=2, stride=2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


# --- norms and rotations ---------------------------------------------------------------------------------------------
def test_norms_divide_by_the_root_of_the_mean_square_and_1e_6():
    """At values of 0.001, whose mean square is 1e-6 too, so that eps shows: FLUX's for both norms."""
    x = 1e-3 * torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    norm, (scale, shift) = model.RMSNorm(16), torch.linspace(-1, 2, 32).view(2, 16)
    with torch.no_grad():
        norm.scale.copy_(scale)
    exact = x.double().numpy()
    by_rms = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm(x).detach(), by_rms * scale.double().numpy(), rtol=0, atol=1e-6)
    centred = exact - exact.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    expected = normed * (1 + scale.double().numpy()) + shift.double().numpy()
    np.testing.assert_allclose(model.modulate(x, shift, scale), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotations_are_complex_products_in_fp32_whatever_comes_in(dtype):
    """numpy's complex numbers in float64, from the angles of each token. A bf16 product would be off by 1e-2."""
    txt_len, rows, cols, axes = 2, 3, 4, (4, 6, 6)
    x = torch.randn(2, 3, txt_len + rows * cols, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    positions = [(0, 0, 0)] * txt_len + [(0, y, x) for y in range(rows) for x in range(cols)]
    angles = [
        [p * 10000.0 ** (-2 * i / n) for p, n in zip(place, axes) for i in range(n // 2)]
        for place in positions
    ]
    out = model.rotate(x, model.rope_table(txt_len, rows, cols, axes, torch.device("cpu")))
    pairs = x.double().numpy()[..., ::2] + 1j * x.double().numpy()[..., 1::2]
    turned = pairs * np.exp(1j * np.array(angles))
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out[..., ::2], turned.real, rtol=0, atol=1e-6)
    np.testing.assert_allclose(out[..., 1::2], turned.imag, rtol=0, atol=1e-6)


# --- FLUX ------------------------------------------------------------------------------------------------------------
def flux_names(double: int, single: int) -> set[str]:
    """The parameter names of the FLUX reference, typed by hand."""
    names = [f"{n}.{layer}" for n in ("time_in", "vector_in") for layer in ("in_layer", "out_layer")]
    names += ["img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    scales = []
    for i in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            names += [
                f"{block}_mod.lin",
                f"{block}_attn.qkv",
                f"{block}_attn.proj",
                f"{block}_mlp.0",
                f"{block}_mlp.2",
            ]
            scales += [f"{block}_attn.norm.{n}_norm.scale" for n in ("query", "key")]
    for i in range(single):
        names += [f"single_blocks.{i}.{n}" for n in ("linear1", "linear2", "modulation.lin")]
        scales += [f"single_blocks.{i}.norm.{n}_norm.scale" for n in ("query", "key")]
    return {f"{n}.{kind}" for n in names for kind in ("weight", "bias")} | set(scales)


def test_a_flux_state_dict_lacks_only_the_gap_embedder():
    ours = set(model.Denoiser(**SMALL).state_dict())
    assert ours - flux_names(2, 3) == {
        f"gap_in.{n}.{k}" for n in ("in_layer", "out_layer") for k in ("weight", "bias")
    }
    assert flux_names(2, 3) - ours == set()


def as_diffusers(tensors: dict[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """Weights (or their gradients) under FLUX's names -> the same under the names and cuts of diffusers."""
    out = {}
    for name, x in tensors.items():
        if name.startswith("gap_in"):
            continue
        kind = name.rsplit(".", 1)[1]
        part = name.split(".")
        if part[0] == "double_blocks":
            block, stream, rest = (
                f"transformer_blocks.{part[1]}",
                part[2][:3],
                part[2][4:] + "." + ".".join(part[3:-1]),
            )
            image = stream == "img"
            if rest == "attn.qkv":
                to = ("to_q", "to_k", "to_v") if image else ("add_q_proj", "add_k_proj", "add_v_proj")
                out.update({f"{block}.attn.{n}.{kind}": piece for n, piece in zip(to, x.chunk(3))})
                continue
            to = {
                "mod.lin": "norm1.linear" if image else "norm1_context.linear",
                "attn.proj": "attn.to_out.0" if image else "attn.to_add_out",
                "attn.norm.query_norm": "attn.norm_q" if image else "attn.norm_added_q",
                "attn.norm.key_norm": "attn.norm_k" if image else "attn.norm_added_k",
                "mlp.0": "ff.net.0.proj" if image else "ff_context.net.0.proj",
                "mlp.2": "ff.net.2" if image else "ff_context.net.2",
            }[rest]
            out[f"{block}.{to}.{'weight' if kind == 'scale' else kind}"] = x
        elif part[0] == "single_blocks":
            block, rest = f"single_transformer_blocks.{part[1]}", ".".join(part[2:-1])
            if rest == "linear1":
                q, k, v, mlp = x.split([width, width, width, 4 * width])
                pieces = {"attn.to_q": q, "attn.to_k": k, "attn.to_v": v, "proj_mlp": mlp}
                out.update({f"{block}.{n}.{kind}": piece for n, piece in pieces.items()})
                continue
            to = {"modulation.lin": "norm.linear", "linear2": "proj_out"}
            to |= {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
            out[f"{block}.{to[rest]}.{'weight' if kind == 'scale' else kind}"] = x
        elif name.startswith(
            "final_layer.adaLN_modulation"
        ):  # FLUX: (shift, scale); diffusers: (scale, shift)
            shift, scale = x.chunk(2)
            out[f"norm_out.linear.{kind}"] = torch.cat([scale, shift])
        else:
            to = {
                "img_in": "x_embedder",
                "txt_in": "context_embedder",
                "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
                "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
                "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
                "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
                "final_layer.linear": "proj_out",
            }[name.rsplit(".", 1)[0]]
            out[f"{to}.{kind}"] = x
    return out


def diffusers_flux(config: dict):
    from diffusers import FluxTransformer2DModel

    patch_values = config["channels"] * config["patch"] ** 2
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=patch_values,
        num_layers=config["double"],
        num_single_layers=config["single"],
        attention_head_dim=config["width"] // config["heads"],
        num_attention_heads=config["heads"],
        joint_attention_dim=config["txt_dim"],
        pooled_projection_dim=config["vec_dim"],
        axes_dims_rope=config["axes"],
    )


def assert_within(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Equal to 1e-5, relative to the largest entry where that exceeds 1 (a gradient's sum over many terms)."""
    error, size = (actual - expected).abs().max().item(), max(1.0, expected.abs().max().item())
    assert error <= 1e-5 * size, f"{name}: {error:.2e} at entries up to {size:.2e}"


@pytest.mark.parametrize("config", [SMALL, OTHER, DEEP], ids=["small", "other", "deep"])
def test_equals_the_flux_of_diffusers_when_the_gap_embedder_is_zero(config):
    """Outputs, and the gradients of every weight and every input, at weights away from zero."""
    network, flux = away_from_zero(config), diffusers_flux(config)
    with torch.no_grad():
        for p in network.gap_in.parameters():
            p.zero_()
    weights = as_diffusers(network.state_dict(), config["width"])
    assert set(weights) == set(flux.state_dict())
    flux.load_state_dict(weights)

    rows, cols, p = 4, 3, config["patch"]
    x_t, t, s, txt, vec = inputs(config, rows, cols)
    probe = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(5)) / x_t[0].numel() ** 0.5
    ours = [x.clone().requires_grad_() for x in (x_t, txt, vec)]
    out = network(ours[0], t, s, ours[1], ours[2])
    (out * probe).sum().backward()

    theirs = [x.clone().requires_grad_() for x in (x_t, txt, vec)]
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    expected = flux(
        hidden_states=F.unfold(theirs[0], kernel_size=p, stride=p).transpose(1, 2),
        encoder_hidden_states=theirs[1],
        pooled_projections=theirs[2],
        timestep=t,
        img_ids=torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).float(),
        txt_ids=torch.zeros(txt.shape[1], 3),
    ).sample
    expected = F.fold(expected.transpose(1, 2), output_size=x_t.shape[2:], kernel_size=p, stride=p)
    (expected * probe).sum().backward()

    assert expected.abs().mean() > 0.1  # away from zero
    assert_within(out, expected, "output")
    for name, a, b in zip(("x_t", "txt", "vec"), ours, theirs):
        assert_within(a.grad, b.grad, name)
    gradients = as_diffusers({name: p.grad for name, p in network.named_parameters()}, config["width"])
    for name, parameter in flux.named_parameters():
        assert parameter.grad.abs().max() > 1e-4, f"{name} takes no part in the comparison"
        assert_within(gradients[name], parameter.grad, name)


# --- initialisation and precision ------------------------------------------------------------------------------------
def test_initialisation():
    """V = 0 exactly, no bias, modulation zero, the other matrices within Xavier's bound."""
    torch.manual_seed(0)
    network = model.Denoiser(**SMALL)
    out = network(*inputs(SMALL))
    assert torch.equal(out, torch.zeros_like(out))
    for name, p in network.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.full_like(p, 1.0 if name.endswith("scale") else 0.0)), name
        elif "mod" in name or name.startswith("final_layer"):
            assert not p.any(), name
        else:
            bound = math.sqrt(6 / (p.shape[0] + p.shape[1]))
            assert 0.98 * bound < p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_bf16_inside_fp32_outside():
    """Output, weights and gradients are fp32 and close to those of the fp32 network."""
    exact, rough = away_from_zero(SMALL), away_from_zero(SMALL, precision=torch.bfloat16)
    out, out_rough = exact(*inputs(SMALL)), rough(*inputs(SMALL))
    assert out_rough.dtype == torch.float32
    assert 1e-4 < (out - out_rough).norm() / out.norm() < 0.05  # bf16 inside for real, and right
    out.square().sum().backward()
    out_rough.square().sum().backward()
    for (name, p), q in zip(exact.named_parameters(), rough.parameters()):
        assert q.dtype == q.grad.dtype == torch.float32
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.9 or p.grad.norm() < 1e-3, (
            name
        )


@pytest.mark.parametrize("outer", [False, True], ids=["no outer autocast", "outer autocast"])
def test_a_pass_without_gradient_leaves_no_trap_in_the_autocast_cache(outer):
    """The step evaluates the network without gradient between passes with gradient; all weights must still learn."""
    network = away_from_zero(SMALL, precision=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        first = network(*inputs(SMALL))
        with torch.no_grad():
            network(*inputs(SMALL))
        (first + network(*inputs(SMALL))).sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.any(), name
    twice = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    network(*inputs(SMALL)).sum().backward()
    for name, p in network.named_parameters():
        assert (twice[name] - 2 * p.grad).norm() < 0.2 * p.grad.norm(), (
            name
        )  # equal, but for bf16 under `outer`


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_callers_autocast_changes_nothing(precision):
    network = away_from_zero(SMALL, precision=precision)
    with torch.no_grad():
        alone = network(*inputs(SMALL))
        with torch.autocast("cpu", torch.bfloat16):
            inside = network(*inputs(SMALL))
    assert torch.equal(alone, inside)


def test_text_order_matters_only_through_the_encoder():
    """All text tokens sit at the origin of RoPE: permuting them leaves V as it is, permuting patches does not."""
    network = away_from_zero(SMALL)
    x_t, t, s, txt, vec = inputs(SMALL)
    with torch.no_grad():
        out = network(x_t, t, s, txt, vec)
        torch.testing.assert_close(network(x_t, t, s, txt.flip(1), vec), out, rtol=0, atol=1e-5)
        assert (network(x_t.roll(2, dims=2), t, s, txt, vec).roll(-2, dims=2) - out).abs().max() > 0.01
        assert (network(x_t, t, s, torch.randn_like(txt), vec) - out).abs().max() > 0.01
