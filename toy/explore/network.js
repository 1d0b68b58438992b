// The network of model.py in plain JavaScript: the forward pass of the laptop model, small enough to read.
//
//     const V = denoiser.assemble(config.model, await unpack(weights));          // unpack: toynet.js
//     const v = await denoiser.velocity(V, x_t, t, s, prompt_words.encoder(12)("a red circle"));
//
// Why not ONNX and its runtime? One evaluation takes 0.12 billion operations, and plain code does over 2 billion a
// second. So there is nothing to download but the weights (the runtime has 10 MB), the page works offline, there is no
// export to keep in step with model.py, and every line of model.py can be found here.
//
// How it is written. A matrix [rows, columns] is a Float32Array, row after row; its length divided by the columns gives
// the rows. Sums are JavaScript's own numbers, in double precision, and are rounded when they are stored. There is
// one sample and no batch. Names are model.py's. All sizes come from config.json.

const denoiser = (() => {
"use strict";

// ---------------------------------------------------------------------------------------------------------------------
// The layers, as in model.Denoiser.__init__
// ---------------------------------------------------------------------------------------------------------------------

/** The network of that size (config.json's "model"), every tensor in its place. */
function assemble(size, tensors) {
  const { width: d, heads, double, single, channels, patch, txt_dim, vec_dim } = size;
  const take = (name, count) => {
    if (tensors[name]?.length !== count) throw new Error(`${name} has ${tensors[name]?.length} numbers, not ${count}`);
    return tensors[name];
  };
  const linear = (name, inputs, outputs) =>
    ({ weight: take(`${name}.weight`, outputs * inputs), bias: take(`${name}.bias`, outputs), inputs });
  const embedder = (name, inputs) =>
    ({ in_layer: linear(`${name}.in_layer`, inputs, d), out_layer: linear(`${name}.out_layer`, d, d) });
  const norm = (name) =>
    ({ query: take(`${name}.query_norm.scale`, d / heads), key: take(`${name}.key_norm.scale`, d / heads) });
  const stream = (name) => ({
    mod: linear(`${name}_mod.lin`, d, 6 * d),
    qkv: linear(`${name}_attn.qkv`, d, 3 * d), norm: norm(`${name}_attn.norm`), proj: linear(`${name}_attn.proj`, d, d),
    mlp: [linear(`${name}_mlp.0`, d, 4 * d), linear(`${name}_mlp.2`, 4 * d, d)],
  });
  const times = (n, make) => Array.from({ length: n }, (_, i) => make(i));
  return {
    size,
    img_in: linear("img_in", channels * patch * patch, d), txt_in: linear("txt_in", txt_dim, d),
    time_in: embedder("time_in", 256), gap_in: embedder("gap_in", 256), vector_in: embedder("vector_in", vec_dim),
    double_blocks: times(double, (i) => ({
      img: stream(`double_blocks.${i}.img`), txt: stream(`double_blocks.${i}.txt`), heads })),
    single_blocks: times(single, (i) => `single_blocks.${i}`).map((name) => ({
      mod: linear(`${name}.modulation.lin`, d, 3 * d), linear1: linear(`${name}.linear1`, d, 7 * d),
      norm: norm(`${name}.norm`), linear2: linear(`${name}.linear2`, 5 * d, d), heads })),
    final: { mod: linear("final_layer.adaLN_modulation.1", d, 2 * d),
             linear: linear("final_layer.linear", d, channels * patch * patch) },
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// The one matrix product
// ---------------------------------------------------------------------------------------------------------------------

/**
 * x [n, inputs] times the transpose of w [m, inputs] -> [n, m]: every row of x with every row of w. Nearly all of the
 * time is spent here. Four rows of x meet two of w at a time: six numbers are read for eight products, and the eight
 * sums stay in registers. At the edges the last row is taken again instead of one that does not exist. `| 0` promises
 * whole numbers; without it the browser may take the indices for fractions, and the loop is half as fast.
 */
function product(x, w, inputs) {
  inputs |= 0;
  const n = (x.length / inputs) | 0, m = (w.length / inputs) | 0;
  const y = new Float32Array(n * m);
  for (let j = 0; j < m; j += 2) {
    const j1 = Math.min(j + 1, m - 1), v0 = j * inputs, v1 = j1 * inputs;
    for (let i = 0; i < n; i += 4) {
      const i1 = Math.min(i + 1, n - 1), i2 = Math.min(i + 2, n - 1), i3 = Math.min(i + 3, n - 1);
      const u0 = i * inputs, u1 = i1 * inputs, u2 = i2 * inputs, u3 = i3 * inputs;
      let a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
      for (let k = 0; k < inputs; k++) {
        const a = w[v0 + k], b = w[v1 + k];
        const x0 = x[u0 + k], x1 = x[u1 + k], x2 = x[u2 + k], x3 = x[u3 + k];
        a0 += a * x0; a1 += a * x1; a2 += a * x2; a3 += a * x3;
        b0 += b * x0; b1 += b * x1; b2 += b * x2; b3 += b * x3;
      }
      y[i * m + j] = a0; y[i1 * m + j] = a1; y[i2 * m + j] = a2; y[i3 * m + j] = a3;
      y[i * m + j1] = b0; y[i1 * m + j1] = b1; y[i2 * m + j1] = b2; y[i3 * m + j1] = b3;
    }
  }
  return y;
}

/** nn.Linear: x [n, inputs] -> [n, outputs]. Its weight is stored as [outputs, inputs], as `product` wants it. */
function linear({ weight, bias, inputs }, x) {
  const y = product(x, weight, inputs);
  for (let i = 0; i < y.length; i++) y[i] += bias[i % bias.length];
  return y;
}

// ---------------------------------------------------------------------------------------------------------------------
// Small pieces
// ---------------------------------------------------------------------------------------------------------------------

const silu = (x) => x.map((a) => a / (1 + Math.exp(-a)));

/** GELU by tanh. (1 + tanh u) / 2 is the logistic function of 2 u. */
const gelu = (x) => x.map((a) => a / (1 + Math.exp(-2 * Math.sqrt(2 / Math.PI) * (a + 0.044715 * a * a * a))));

const add = (x, y) => x.map((a, i) => a + y[i]);

/** x + gate y: a gate [d] for all rows of x and y [n, d]. */
const add_gated = (x, gate, y) => x.map((a, i) => a + gate[i % gate.length] * y[i]);

/** [x; y]: the rows of x, then those of y. */
function join(x, y) {
  const both = new Float32Array(x.length + y.length);
  both.set(x);
  both.set(y, x.length);
  return both;
}

/** Columns from .. to of x [n, total]. */
function columns(x, total, from, to) {
  const out = new Float32Array((x.length / total) * (to - from));
  for (let row = 0; row * total < x.length; row++) {
    out.set(x.subarray(row * total + from, row * total + to), row * (to - from));
  }
  return out;
}

/** x [n, d] -> [d, n] */
function transpose(x, d) {
  const n = x.length / d, out = new Float32Array(x.length);
  for (let i = 0; i < n; i++) for (let j = 0; j < d; j++) out[j * n + i] = x[i * d + j];
  return out;
}

/** model.Embedder */
const embed = ({ in_layer, out_layer }, x) => linear(out_layer, silu(linear(in_layer, x)));

/** model.Modulation: vec [d] -> n vectors [d], the shifts, scales and gates of adaLN. */
function modulation(layer, vec) {
  const all = linear(layer, silu(vec)), d = vec.length;
  return Array.from({ length: all.length / d }, (_, i) => all.subarray(i * d, (i + 1) * d));
}

/** model.modulate: LayerNorm without learned parameters, then x (1 + scale) + shift. x [n, d] */
function modulate(x, shift, scale) {
  const d = shift.length, out = new Float32Array(x.length);
  for (let start = 0; start < x.length; start += d) {
    let sum = 0, squares = 0;
    for (let i = 0; i < d; i++) sum += x[start + i];
    const mean = sum / d;
    for (let i = 0; i < d; i++) squares += (x[start + i] - mean) ** 2;
    const factor = 1 / Math.sqrt(squares / d + 1e-6);
    for (let i = 0; i < d; i++) out[start + i] = (x[start + i] - mean) * factor * (1 + scale[i]) + shift[i];
  }
  return out;
}

/** model.RMSNorm: x / rms(x) * scale, for every row of x [n, d]. */
function rms_norm(x, scale) {
  const d = scale.length, out = new Float32Array(x.length);
  for (let start = 0; start < x.length; start += d) {
    let squares = 0;
    for (let i = 0; i < d; i++) squares += x[start + i] ** 2;
    const factor = 1 / Math.sqrt(squares / d + 1e-6);
    for (let i = 0; i < d; i++) out[start + i] = x[start + i] * factor * scale[i];
  }
  return out;
}

// ---------------------------------------------------------------------------------------------------------------------
// Time and place
// ---------------------------------------------------------------------------------------------------------------------

/**
 * model.sinusoid: cos, then sin of 1000 t at 128 frequencies. Angles reach 1000, where the last bit of single precision
 * can be seen in the cosine; so every operation is rounded as PyTorch rounds it.
 */
function sinusoid(t) {
  const float = Math.fround, half = 128, slope = float(-float(Math.log(10000)));
  const angles = Array.from({ length: half }, (_, i) =>
    float(float(1000 * float(t)) * float(Math.exp(float(float(slope * i) / half)))));
  return Float32Array.from([...angles.map(Math.cos), ...angles.map(Math.sin)]);
}

/**
 * model.rope_table: per token, the cosines and sines of its angles. Text tokens are at the origin, image tokens at
 * (0, y, x). [txt_len + rows * cols, head_dim / 2] each.
 */
function rope_table(txt_len, rows, cols, axes) {
  const frequencies = axes.map((n) => Array.from({ length: n / 2 }, (_, i) => 10000 ** ((-2 * i) / n)));
  const angles = (position) => frequencies.flatMap((fs, axis) => fs.map((f) => position[axis] * f));
  const text = Array.from({ length: txt_len }, () => [0, 0, 0]);
  const image = Array.from({ length: rows * cols }, (_, i) => [0, Math.floor(i / cols), i % cols]);
  const all = [...text, ...image].flatMap(angles);
  return { cos: Float32Array.from(all, Math.cos), sin: Float32Array.from(all, Math.sin) };
}

/** model.rotate: turn each pair of neighbours in x [n, head_dim] by its token's angle. */
function rotate(x, { cos, sin }) {
  const out = new Float32Array(x.length);
  for (let i = 0; i < x.length; i += 2) {
    const c = cos[i / 2], s = sin[i / 2];
    out[i] = c * x[i] - s * x[i + 1];
    out[i + 1] = s * x[i] + c * x[i + 1];
  }
  return out;
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention
// ---------------------------------------------------------------------------------------------------------------------

/**
 * model.SelfAttention.project, after its linear layer: the columns of qkv [n, 3 d] are (three, head, channel). -> one
 * { q, k, v } per head, [n, c] each with c = d / heads; q and k are normalised.
 */
function split_heads(qkv, heads, norm) {
  const c = norm.query.length;
  const part = (which, head) => columns(qkv, 3 * heads * c, (which * heads + head) * c, (which * heads + head + 1) * c);
  return Array.from({ length: heads }, (_, head) =>
    ({ q: rms_norm(part(0, head), norm.query), k: rms_norm(part(1, head), norm.key), v: part(2, head) }));
}

/** Each row of x [n, m] becomes positive with sum 1: exp(scale x), divided by its sum. */
function softmax(x, m, scale) {
  const out = new Float32Array(x.length);
  for (let start = 0; start < x.length; start += m) {
    let most = -Infinity, sum = 0;
    for (let i = start; i < start + m; i++) most = Math.max(most, x[i]);
    for (let i = start; i < start + m; i++) sum += out[i] = Math.exp(scale * (x[i] - most));
    for (let i = start; i < start + m; i++) out[i] /= sum;
  }
  return out;
}

/** model.attention: every token looks at every token. One { q, k, v } per head, [n, c] each -> [n, heads * c]. */
function attention(per_head, c, rope) {
  const heads = per_head.length, n = per_head[0].q.length / c, out = new Float32Array(n * heads * c);
  per_head.forEach(({ q, k, v }, head) => {
    const scores = product(rotate(q, rope), rotate(k, rope), c);  // [n, n]
    const answers = product(softmax(scores, n, 1 / Math.sqrt(c)), transpose(v, c), n);  // [n, c]
    for (let i = 0; i < n; i++) out.set(answers.subarray(i * c, (i + 1) * c), (i * heads + head) * c);
  });
  return out;
}

// ---------------------------------------------------------------------------------------------------------------------
// The blocks
// ---------------------------------------------------------------------------------------------------------------------

/** model.DoubleBlock: text and image keep separate weights and meet in one attention (text first). -> [img, txt] */
function double_block(block, img, txt, vec, rope) {
  const [i_shift1, i_scale1, i_gate1, i_shift2, i_scale2, i_gate2] = modulation(block.img.mod, vec);
  const [t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2] = modulation(block.txt.mod, vec);
  const project = ({ qkv, norm }, x) => split_heads(linear(qkv, x), block.heads, norm);
  const mlp = ([first, second], x) => linear(second, gelu(linear(first, x)));

  const of_img = project(block.img, modulate(img, i_shift1, i_scale1));
  const of_txt = project(block.txt, modulate(txt, t_shift1, t_scale1));
  const both = of_img.map(({ q, k, v }, head) =>
    ({ q: join(of_txt[head].q, q), k: join(of_txt[head].k, k), v: join(of_txt[head].v, v) }));
  const out = attention(both, block.img.norm.query.length, rope);
  const t_out = out.subarray(0, txt.length), i_out = out.subarray(txt.length);

  img = add_gated(img, i_gate1, linear(block.img.proj, i_out));
  img = add_gated(img, i_gate2, mlp(block.img.mlp, modulate(img, i_shift2, i_scale2)));
  txt = add_gated(txt, t_gate1, linear(block.txt.proj, t_out));
  txt = add_gated(txt, t_gate2, mlp(block.txt.mlp, modulate(txt, t_shift2, t_scale2)));
  return [img, txt];
}

/** model.SingleBlock: one stream; attention and MLP run side by side and share their two linears. x [n, d] */
function single_block(block, x, vec, rope) {
  const [shift, scale, gate] = modulation(block.mod, vec);
  const d = vec.length, n = x.length / d;
  const both = linear(block.linear1, modulate(x, shift, scale));  // [n, 7 d]
  const per_head = split_heads(columns(both, 7 * d, 0, 3 * d), block.heads, block.norm);
  const out = attention(per_head, d / block.heads, rope), mlp = gelu(columns(both, 7 * d, 3 * d, 7 * d));
  const side = new Float32Array(n * 5 * d);  // [out | mlp], row by row
  for (let i = 0; i < n; i++) {
    side.set(out.subarray(i * d, (i + 1) * d), i * 5 * d);
    side.set(mlp.subarray(i * 4 * d, (i + 1) * 4 * d), i * 5 * d + d);
  }
  return add_gated(x, gate, linear(block.linear2, side));
}

/** model.FinalLayer */
function final_layer({ mod, linear: last }, x, vec) {
  const [shift, scale] = modulation(mod, vec);
  return linear(last, modulate(x, shift, scale));
}

// ---------------------------------------------------------------------------------------------------------------------
// The network
// ---------------------------------------------------------------------------------------------------------------------

/** Where the values of a picture [channels, side, side] stand among those of its patches, [(h w), (c ph pw)]. */
function patch_order(channels, side, patch) {
  const across = side / patch, order = new Uint32Array(channels * side * side);
  let place = 0;
  for (let h = 0; h < across; h++) for (let w = 0; w < across; w++) {
    for (let c = 0; c < channels; c++) for (let ph = 0; ph < patch; ph++) for (let pw = 0; pw < patch; pw++) {
      order[place++] = (c * side + h * patch + ph) * side + w * patch + pw;
    }
  }
  return order;
}

/**
 * model.Denoiser.forward: x_t [channels * side * side], times t and s, cond = { tokens, pooled } -> v like x_t (Eq. 6).
 * `breathe` is awaited between two blocks: there the page may draw, or stop the computation by throwing.
 */
async function velocity(V, x_t, t, s, cond, breathe = () => {}) {
  const { channels, patch, txt_dim, axes } = V.size;
  const side = Math.sqrt(x_t.length / channels), order = patch_order(channels, side, patch);
  const gap = Math.fround(t) - Math.fround(s);
  const of_times = add(embed(V.time_in, sinusoid(t)), embed(V.gap_in, sinusoid(gap)));  // Eq. s.9
  const vec = add(of_times, embed(V.vector_in, cond.pooled));  // Eq. s.10
  const rope = rope_table(cond.tokens.length / txt_dim, side / patch, side / patch, axes);

  let img = linear(V.img_in, Float32Array.from(order, (from) => x_t[from]));
  let txt = linear(V.txt_in, cond.tokens);
  for (const block of V.double_blocks) {
    [img, txt] = double_block(block, img, txt, vec, rope);
    await breathe();
  }
  let x = join(txt, img);
  for (const block of V.single_blocks) {
    x = single_block(block, x, vec, rope);
    await breathe();
  }
  const patches = final_layer(V.final, x.subarray(txt.length), vec);
  const v = new Float32Array(x_t.length);
  order.forEach((to, i) => { v[to] = patches[i]; });
  return v;
}

return { assemble, velocity, product };
})();
