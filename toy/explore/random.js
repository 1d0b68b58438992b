// Random numbers, the same as rng.py's: a port of what NumPy does for
//
//     rng(seed, purpose, *key).standard_normal(n, dtype=np.float32)
//
// So a seed gives in the browser the noise that it gives sample.py, bit for bit. Three parts, as in NumPy: SeedSequence
// mixes the integers into a key, Philox turns (key, counter) into random bits, the ziggurat turns bits into normals.
//
// The one exception is a value further out than 3.65 (one in 4,000). It goes through log1p in single precision, whose
// last bit depends on the C library that NumPy was built with.

const random = (() => {
"use strict";

// The purpose enters as the first 8 bytes of its SHA-256, a 64-bit word [low, high]. A browser has SHA-256 only on
// secure pages and not in a file, so the words that the page needs are written down (a test compares them).
const PURPOSES = { sampling: [0x410e6352, 0x2e86f931], page: [0x5a316036, 0x25dff39a] };

// ---------------------------------------------------------------------------------------------------------------------
// SeedSequence: any number of integers -> a key of 128 bits (O'Neill's seed_seq, in 32-bit arithmetic)
// ---------------------------------------------------------------------------------------------------------------------

/** An integer from 0 to 2^53 - 1 as 32-bit words, lowest first; 0 is one word. */
function words32(integer) {
  const low = integer % 2 ** 32, high = Math.floor(integer / 2 ** 32);
  return high > 0 ? [low, high] : [low];
}

/** A function that scrambles one word after the other; its constant moves on with every call. */
function hasher(constant, multiplier) {
  return (word) => {
    const mixed = word ^ constant;
    constant = Math.imul(constant, multiplier);
    const product = Math.imul(mixed, constant);
    return (product ^ (product >>> 16)) >>> 0;
  };
}

function mix(x, y) {
  const result = Math.imul(0xca01f9dd, x) - Math.imul(0x4973f715, y);
  return (result ^ (result >>> 16)) >>> 0;
}

/** The two 64-bit words (BigInt) that NumPy's SeedSequence(entropy).generate_state(2, np.uint64) gives. */
function seed_key(entropy) {
  const hash = hasher(0x43b0d7e5, 0x931e8875);
  const pool = [0, 1, 2, 3].map((i) => hash(entropy[i] ?? 0));
  for (let from = 0; from < 4; from++) {
    for (let to = 0; to < 4; to++) if (from !== to) pool[to] = mix(pool[to], hash(pool[from]));
  }
  for (const word of entropy.slice(4)) {
    for (let to = 0; to < 4; to++) pool[to] = mix(pool[to], hash(word));
  }
  const out = pool.map(hasher(0x8b51f9dd, 0x58f38ded)).map(BigInt);
  return [out[0] | (out[1] << 32n), out[2] | (out[3] << 32n)];
}

// ---------------------------------------------------------------------------------------------------------------------
// Philox 4x64 with 10 rounds: (counter, key) -> 256 random bits (Salmon et al. 2011)
// ---------------------------------------------------------------------------------------------------------------------

const MASK = (1n << 64n) - 1n;

/** Four 64-bit words for a counter of four 64-bit words. Only the first word ever moves here. */
function philox_block(counter, key) {
  let [a, b, c, d] = [counter, 0n, 0n, 0n];
  let [k0, k1] = key;
  for (let round = 0; round < 10; round++) {
    const p = 0xd2e7470ee14c6c93n * a, q = 0xca5a826395121157n * c;
    [a, b, c, d] = [(q >> 64n) ^ b ^ k0, q & MASK, (p >> 64n) ^ d ^ k1, p & MASK];
    k0 = (k0 + 0x9e3779b97f4a7c15n) & MASK;
    k1 = (k1 + 0xbb67ae8584caa73bn) & MASK;
  }
  return [a, b, c, d];
}

/** A function that gives the next 32 random bits at every call. The first block has the counter 1, as in NumPy. */
function philox(key) {
  let counter = 0n, buffer = [];
  return () => {
    if (buffer.length === 0) {
      const block = philox_block(++counter, key);
      buffer = block.flatMap((word) => [Number(word & 0xffffffffn), Number(word >> 32n)]);  // the low half first
    }
    return buffer.shift();
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// The ziggurat: bits -> normal numbers (Marsaglia and Tsang 2000), 256 layers of equal area
// ---------------------------------------------------------------------------------------------------------------------
// Layer i reaches out to edge[i]; density[i] = exp(-edge[i]^2 / 2). A point in the inner part of its layer, 99% of all,
// is taken without computing the density.

const TAIL = 3.6541528853610088;  // where the last layer ends and the tail begins
const float = Math.fround;

const ziggurat = (() => {
  const f = (x) => Math.exp(-0.5 * x * x);
  const AREA = 0.004928673233974658;  // of every layer: TAIL f(TAIL) + the tail, the integral of f from TAIL
  const edge = new Array(256).fill(0);
  edge[255] = TAIL;
  for (let i = 254; i > 0; i--) edge[i] = Math.sqrt(-2 * Math.log(AREA / edge[i + 1] + f(edge[i + 1])));
  const base = AREA / f(TAIL);  // the width that layer 0, the one with the tail, would have as a rectangle
  const width = edge.map((x, i) => (i === 0 ? base : x));
  const inner = edge.map((x, i) => (i === 0 ? TAIL : edge[i - 1]));
  return {
    scale: Float32Array.from(width, (w) => w / 2 ** 23),
    inside: Uint32Array.from(width, (w, i) => Math.round((inner[i] / w) * 2 ** 23)),
    density: Float32Array.from(edge, f),
  };
})();

/** One standard normal number in single precision. `next` gives 32 random bits. */
function standard_normal(next) {
  const uniform = () => float((next() >>> 8) / 2 ** 24);  // [0, 1)
  const minus_log = () => float(-Math.log1p(-uniform()));  // exponential
  const { scale, inside, density } = ziggurat;
  for (;;) {
    const bits = next();
    const layer = bits & 0xff, sign = bits & 0x100 ? -1 : 1, place = bits >>> 9;
    const x = float(sign * place * scale[layer]);
    if (place < inside[layer]) return x;
    if (layer > 0) {
      const height = float(float(density[layer - 1] - density[layer]) * uniform());
      if (float(height + density[layer]) < Math.exp(-0.5 * x * x)) return x;
      continue;
    }
    for (;;) {  // beyond TAIL
      const beyond = float(minus_log() * float(1 / TAIL)), y = minus_log();
      if (float(y + y) > float(beyond * beyond)) return float((place & 0x100 ? -1 : 1) * float(beyond + float(TAIL)));
    }
  }
}

/** The random bits of (seed, purpose, ...key): a function that gives the next 32. */
const bits_of = (seed, purpose, key) =>
  philox(seed_key([...words32(seed), ...PURPOSES[purpose], ...key.flatMap(words32)]));

/** rng.normal for one row: n standard normal numbers that depend on (seed, purpose, ...key) alone. */
function normal(seed, purpose, key, n) {
  const next = bits_of(seed, purpose, key);
  return Float32Array.from({ length: n }, () => standard_normal(next));
}

/** n numbers in [0, 1), of double precision as NumPy's random(). */
function uniform(seed, purpose, key, n) {
  const next = bits_of(seed, purpose, key);
  return Float64Array.from({ length: n }, () => {
    const low = next(), high = next();
    return (high * 2 ** 21 + (low >>> 11)) / 2 ** 53;
  });
}

return { PURPOSES, normal, uniform };
})();
