// The toy's two-time network V(x_t, t, s, c) of toy/training.py: a residual MLP of 40,000 weights.
//
//     const V = toy_network(await unpack(weights));
//     V([[0.1, 0.2], [1, 0]], 0.8, 0.4, 0)          // velocities of two points, both at times t and s

const FREQUENCIES = [1, 2, 4, 8, 16];
const silu = (h) => h / (1 + Math.exp(-h));

/** The number that 16 bits stand for in IEEE 754 half precision. */
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  return sign * (exponent === 0 ? fraction * 2 ** -24 : (1024 + fraction) * 2 ** (exponent - 25));
}

/**
 * {name: Float32Array} from what explore.pack wrote: {shapes: {name: [rows, columns]}, numbers}, the numbers as base64
 * of gzip. A tensor is a scale for each row, in half precision, and then its weights in units of it, one byte each.
 */
async function unpack({ shapes, numbers }) {
  const bytes = Uint8Array.from(atob(numbers), (letter) => letter.charCodeAt(0)), weights = {};
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  let at = 0;
  for (const [name, [rows, columns]] of Object.entries(shapes)) {
    const scales = Array.from(new Uint16Array(buffer.slice(at, at + 2 * rows)), half);
    const units = new Int8Array(buffer, at + 2 * rows, rows * columns);
    weights[name] = Float32Array.from(units, (unit, i) => unit * scales[Math.floor(i / columns)]);
    at += rows * (2 + columns);
  }
  return weights;
}

/** out += x W, for a row x and W [x.length, out.length] stored row by row. Typed arrays only: they make it fast. */
function add_product(out, x, W) {
  const width = out.length;
  for (let i = 0; i < x.length; i++) {
    const value = x[i], row = i * width;
    for (let j = 0; j < width; j++) out[j] += value * W[row + j];
  }
}

/** cos and sin of the time at each frequency (s.9). */
function waves(t) {
  return Float64Array.of(...FREQUENCIES.map((f) => Math.cos(f * t)), ...FREQUENCIES.map((f) => Math.sin(f * t)));
}

/** V(x, t, s, c): the velocity of each point of x; t, s and c are the same for all of them. */
function toy_network(weights) {
  const width = weights.x_bias.length;
  const names = Object.keys(weights).filter((name) => /^block\d+$/.test(name)).sort();
  const blocks = names.map((name) => ({ W: weights[name], bias: weights[`${name}_bias`] }));
  const active = new Float64Array(width);

  return (x, t, s, c) => {
    const base = new Float64Array(width); // what all points have in common: prompt and times
    for (let j = 0; j < width; j++) {
      base[j] = weights.prompt[c * width + j] + weights.x_bias[j] + weights.t_bias[j] + weights.gap_bias[j];
    }
    add_product(base, waves(t), weights.t);
    add_product(base, waves(t - s), weights.gap); // s.10: the second time enters as t - s
    return x.map((point) => {
      const h = base.slice();
      add_product(h, Float64Array.from(point), weights.x);
      for (const { W, bias } of blocks) {
        for (let j = 0; j < width; j++) {
          active[j] = silu(h[j]);
          h[j] += bias[j];
        }
        add_product(h, active, W);
      }
      const V = new Float64Array(2);
      add_product(V, h.map(silu), weights.out);
      return [V[0], V[1]];
    });
  };
}
