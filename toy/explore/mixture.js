// Data whose every secret is known: the closed form of toy/mixture.py, one point at a time.
//
//     const q = mixture(layout);                    // {means [C][M][2], weights [C][M], std}
//     posterior_mean(q, [0.1, 0.2], 0.8, 0)         // E[x0 | x_t, c]; c = q.C is the null prompt
//
// A component N(m, v I) of q(x0 | c) becomes N((1-t) m, ((1-t)^2 v + t^2) I) in q(x_t | c). So densities and posterior
// means are closed forms at every t. Points are arrays [x, y], times are numbers in [0, 1].

function mixture({ means, weights, std }) {
  const C = means.length, M = means[0].length, m = means.flat();
  // Row c holds the weights of all K components in q(x0 | c); the last row is q(x0), the null prompt's.
  const row = (c) => m.map((_, k) => (Math.floor(k / M) === c ? weights[c][k % M] : 0));
  const table = means.map((_, c) => row(c));
  table.push(m.map((_, k) => weights.flat()[k] / C));
  return { C, M, m, v: std * std, table, log_table: table.map((shares) => shares.map(Math.log)) };
}

/** log(weight times density) of each component at x_t, [K]; -Infinity for the components of other conditions. */
function log_shares(q, x_t, t, c) {
  const variance = (1 - t) ** 2 * q.v + t ** 2, log_norm = Math.log(2 * Math.PI * variance);
  return q.m.map((m, k) => {
    const u = x_t[0] - (1 - t) * m[0], w = x_t[1] - (1 - t) * m[1];
    return q.log_table[c][k] - (u * u + w * w) / (2 * variance) - log_norm;
  });
}

/** log sum exp, with the largest term taken out, so that nothing underflows. */
function log_sum(terms) {
  let top = -Infinity, sum = 0;
  for (const term of terms) if (term > top) top = term;
  for (const term of terms) sum += Math.exp(term - top);
  return top + Math.log(sum);
}

/** log q(x_t | c). */
function log_density(q, x_t, t, c) {
  return log_sum(log_shares(q, x_t, t, c));
}

/** q(x0 | x_t, c), again a mixture: the share of each component and its mean, {shares [K], means [K][2]}. */
function posterior(q, x_t, t, c) {
  const logs = log_shares(q, x_t, t, c), total = log_sum(logs);
  const gain = ((1 - t) * q.v) / ((1 - t) ** 2 * q.v + t ** 2); // how much of the deviation in x_t is signal
  return {
    shares: logs.map((log) => Math.exp(log - total)),
    means: q.m.map(([u, w]) => [u + gain * (x_t[0] - (1 - t) * u), w + gain * (x_t[1] - (1 - t) * w)]),
  };
}

/** E[x0 | x_t, c]: what a perfect network answers (Eq. 4). */
function posterior_mean(q, x_t, t, c) {
  const { shares, means } = posterior(q, x_t, t, c);
  let x = 0, y = 0;
  for (let k = 0; k < shares.length; k++) {
    x += shares[k] * means[k][0];
    y += shares[k] * means[k][1];
  }
  return [x, y];
}

/** E_p[x0 | x_s, c] when p(x0 | c) is a list of answers (toy/ideal.py). At s = 0 nothing is hidden: x_s itself. */
function mean_of_answers(x_s, s, answers) {
  if (s === 0) return x_s;
  const logs = new Float64Array(answers.length); // a loop, because the field asks this for all answers at every arrow
  let top = -Infinity;
  for (let n = 0; n < answers.length; n++) {
    const u = x_s[0] - (1 - s) * answers[n][0], w = x_s[1] - (1 - s) * answers[n][1];
    logs[n] = -(u * u + w * w) / (2 * s * s);
    if (logs[n] > top) top = logs[n];
  }
  let total = 0, x = 0, y = 0;
  for (let n = 0; n < answers.length; n++) {
    if (logs[n] < top - 40) continue; // its share is below the last digit
    const share = Math.exp(logs[n] - top);
    total += share;
    x += share * answers[n][0];
    y += share * answers[n][1];
  }
  return [x / total, y / total];
}

/** The standard deviations between a point and the nearest mode of condition c (toy/measures.py). */
function off_by(q, x, c) {
  const own = q.m.filter((_, k) => q.table[c][k] > 0);
  return Math.min(...own.map((m) => Math.hypot(x[0] - m[0], x[1] - m[1]))) / Math.sqrt(q.v);
}

/** Which mode of condition c is nearest to a point: its position among the condition's own modes. */
function nearest_mode(q, x, c) {
  const own = q.m.filter((_, k) => q.table[c][k] > 0);
  const distances = own.map((m) => Math.hypot(x[0] - m[0], x[1] - m[1]));
  return distances.indexOf(Math.min(...distances));
}

/** The mean distance over all pairs of a point of `a` and a point of `b`; with `same`, over pairs of different ones. */
function mean_distance(a, b, same = false) {
  let sum = 0;
  for (const [x, y] of a) for (const [u, v] of b) sum += Math.sqrt((x - u) ** 2 + (y - v) ** 2);
  return sum / (a.length * (b.length - (same ? 1 : 0)));
}

/** 2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased: 0 for equal distributions (toy/measures.py). */
function energy_distance(x, y, within_y = mean_distance(y, y, true)) {
  return 2 * mean_distance(x, y) - mean_distance(x, x, true) - within_y;
}
