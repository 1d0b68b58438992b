// Prompts to conditions: a port of encoders.WordVectors, the built-in text encoder of the laptop model.
//
//     const text = prompt_words.encoder(12);
//     const { tokens, pooled } = text("a photo of a red circle");   // Float32Array [12 * 256] and [256]
//
// A word's vector is 128 bits of its hash, read as signs. There is no table of words: any word has a vector, in the
// browser the same one as in Python.

const prompt_words = (() => {
"use strict";

// ---------------------------------------------------------------------------------------------------------------------
// Words: encoders.split_words
// ---------------------------------------------------------------------------------------------------------------------

// Code points that are a word each: punctuation, symbols, emoji, and scripts without spaces. As in encoders.SINGLE.
const SINGLE =
  "!-\\/:-@\\[-`\\{-~\\u00a1-\\u00bf\\u00d7\\u00f7\\u2010-\\u2bff\\u2e00-\\u2e7f\\u3001-\\u30ff\\u3400-\\u9fff" +
  "\\uf900-\\ufaff\\u{1f000}-\\u{1faff}\\u{20000}-\\u{3ffff}";
// What separates words. Python's \s is written out, because JavaScript's is another set.
const SPACE = "\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const GAP = SPACE + "\\u200b-\\u200f\\ufe0e\\ufe0f";
const WORD = new RegExp(`(?![${GAP}])[${SINGLE}]|[^${SINGLE}${GAP}]+`, "gu");

/** "A red-hot café!" -> a, red, -, hot, café, ! */
function split_words(prompt) {
  return prompt.normalize("NFKC").toLowerCase().match(WORD) ?? [];
}

/**
 * UTF-8. Half of a surrogate pair is written like any other code point, as Python's "surrogatepass" does; the browser's
 * TextEncoder would replace it.
 */
function utf8(text) {
  return Array.from(text, (letter) => letter.codePointAt(0)).flatMap((code) => {
    const tail = (shift) => 0x80 | ((code >> shift) & 0x3f);
    if (code < 0x80) return [code];
    if (code < 0x800) return [0xc0 | (code >> 6), tail(0)];
    if (code < 0x10000) return [0xe0 | (code >> 12), tail(6), tail(0)];
    return [0xf0 | (code >> 18), tail(12), tail(6), tail(0)];
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// BLAKE2b (RFC 7693), with 16 bytes of digest and a "person" of up to 16 bytes
// ---------------------------------------------------------------------------------------------------------------------

const MASK = (1n << 64n) - 1n;
const IV = [
  0x6a09e667f3bcc908n, 0xbb67ae8584caa73bn, 0x3c6ef372fe94f82bn, 0xa54ff53a5f1d36f1n,
  0x510e527fade682d1n, 0x9b05688c2b3e6c1fn, 0x1f83d9abfb41bd6bn, 0x5be0cd19137e2179n,
];
// The order in which a round takes the 16 words of a block; rounds 10 and 11 are rounds 0 and 1 again.
const SIGMA = [
  [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
  [11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4], [7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8],
  [9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13], [2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9],
  [12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11], [13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10],
  [6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5], [10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0],
];
// The columns and then the diagonals of the state, a 4 x 4 matrix.
const QUADS = [
  [0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15],
  [0, 5, 10, 15], [1, 6, 11, 12], [2, 7, 8, 13], [3, 4, 9, 14],
];

/** Bytes as 64-bit words, the lowest byte first, padded with zeros to `count` words. */
function words64(bytes, count) {
  const words = new Array(count).fill(0n);
  bytes.forEach((byte, i) => { words[i >> 3] |= BigInt(byte) << BigInt(8 * (i & 7)); });
  return words;
}

function stir(v, [a, b, c, d], x, y) {
  const turn = (word, bits) => (word >> bits) | ((word << (64n - bits)) & MASK);
  v[a] = (v[a] + v[b] + x) & MASK;
  v[d] = turn(v[d] ^ v[a], 32n);
  v[c] = (v[c] + v[d]) & MASK;
  v[b] = turn(v[b] ^ v[c], 24n);
  v[a] = (v[a] + v[b] + y) & MASK;
  v[d] = turn(v[d] ^ v[a], 16n);
  v[c] = (v[c] + v[d]) & MASK;
  v[b] = turn(v[b] ^ v[c], 63n);
}

/** One block of up to 128 bytes into the state h; `read` counts the bytes so far, these included. */
function compress(h, block, read, last) {
  const m = words64(block, 16), v = [...h, ...IV];
  v[12] ^= BigInt(read);
  if (last) v[14] ^= MASK;
  for (let round = 0; round < 12; round++) {
    const order = SIGMA[round % 10];
    QUADS.forEach((quad, i) => stir(v, quad, m[order[2 * i]], m[order[2 * i + 1]]));
  }
  return h.map((word, i) => word ^ v[i] ^ v[i + 8]);
}

/** hashlib.blake2b(bytes, digest_size=16, person=person).digest() */
function blake2b(bytes, person) {
  const parameters = words64([16, 0, 1, 1], 6).concat(words64(utf8(person), 2));  // size, no key, fanout 1, depth 1
  let h = IV.map((word, i) => word ^ parameters[i]);
  for (let start = 0; start === 0 || start < bytes.length; start += 128) {
    const end = Math.min(start + 128, bytes.length);
    h = compress(h, bytes.slice(start, end), end, end === bytes.length);
  }
  return [h[0], h[1]].flatMap((word) =>
    [0, 8, 16, 24, 32, 40, 48, 56].map((bit) => Number((word >> BigInt(bit)) & 0xffn)));
}

// ---------------------------------------------------------------------------------------------------------------------
// Vectors: encoders.hashed_signs and encoders.WordVectors.encode
// ---------------------------------------------------------------------------------------------------------------------

const D = 256;  // the width of a token and of the pooled vector

/** 128 values of +-1, a function of (kind, word). */
function hashed_signs(kind, word) {
  return blake2b(utf8(word), kind).flatMap((byte) =>
    [7, 6, 5, 4, 3, 2, 1, 0].map((bit) => 2 * ((byte >> bit) & 1) - 1));
}

/** 1 / sqrt(variance) to a power of two; 1 for 0. */
function near_root(variance) {
  const bits = variance === 0 ? 0 : variance.toString(2).length;
  return 2 ** -Math.floor(bits / 2);
}

/**
 * prompt -> { tokens [txt_len, 256], pooled [256] }. A token: word i, its neighbours i - 1 and i + 1, the position.
 * The pooled vector: the sum of the words, and their first moment in position.
 */
function encoder(txt_len) {
  const position = Array.from({ length: txt_len }, (_, i) => hashed_signs("position", String(i)).slice(0, 32));
  const end = hashed_signs("mark", "end"), beyond = hashed_signs("mark", "beyond");
  return (prompt) => {
    const words = split_words(prompt).slice(0, txt_len - 1).map((word) => hashed_signs("word", word));
    const v = [beyond, ...words, end, beyond];
    const n = v.length - 2;  // tokens, the end included
    const tokens = new Float32Array(txt_len * D), pooled = new Float32Array(D);
    for (let i = 0; i < n; i++) {
      const state = [...v[i + 1], ...v[i].slice(0, 48), ...v[i + 2].slice(0, 48), ...position[i]];
      tokens.set(state, i * D);
      const place = 2 * i - (n - 1);  // -(n-1), -(n-3), .. n-1
      v[i + 1].forEach((sign, j) => {
        pooled[j] += sign;
        pooled[128 + j] += place * sign;
      });
    }
    const scales = [near_root(n), near_root((n * (n * n - 1)) / 3)];
    return { tokens, pooled: pooled.map((sum, j) => sum * scales[j < 128 ? 0 : 1]) };
  };
}

return { split_words, encoder };
})();
