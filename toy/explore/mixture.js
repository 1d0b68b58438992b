// Data whose every secret is known: the closed form of toy/mixture.py, one point at a time.
//
//     const q = mixture(layout);                    // {means [C][M][2], weights [C][M], std}
//     posterior_mean(q, [0.1, 0.2], 0.8, 0)         // E[x0 | x_t, c]; c = q.C is the null prompt
//
// A component N(m, v I) of q(x0 | c) becomes N(alpha m, (alpha^2 v + sigma^2) I) in q(x_t | c). So densities and
// posterior means are closed forms at every t. Points are arrays [x, y], times are numbers in [0, 1].

/** The mixture. `wrong` is the share of samples whose label is drawn anew from all: q(x0 | c) gets a part of q(x0). */
function mixture({ means, weights, std }, wrong = 0) {
  const C = means.length, M = means[0].length, m = means.flat();
  const all = weights.flat().map((weight) => weight / C); // q(x0), the null prompt's: the last row of the table
  const own = (c, k) => (Math.floor(k / M) === c ? weights[c][k % M] : 0);
  const table = means.map((_, c) => all.map((share, k) => (1 - wrong) * own(c, k) + wrong * share));
  table.push(all);
  return { C, M, m, weights, std, v: std * std, table, log_table: table.map((shares) => shares.map(Math.log)) };
}

/** The modes that condition c means, whatever the labels say; all for the null prompt. */
const modes_of = (q, c) => (c === q.C ? q.m : q.m.slice(c * q.M, (c + 1) * q.M));

/** How much of a deviation from a mode is signal at time t. */
const gain_of = (q, t) => (alpha(t) * q.v) / (alpha(t) ** 2 * q.v + sigma(t) ** 2);

/** The share of each component in q(x0 | x_t, c), [K]. A loop, because it is asked a thousand times a frame. */
function shares_of(q, x_t, t, c) {
  const K = q.m.length, a = alpha(t), variance = a * a * q.v + sigma(t) ** 2, shares = new Float64Array(K);
  let top = -Infinity, total = 0;
  for (let k = 0; k < K; k++) {
    const u = x_t[0] - a * q.m[k][0], w = x_t[1] - a * q.m[k][1];
    shares[k] = q.log_table[c][k] - (u * u + w * w) / (2 * variance);
    if (shares[k] > top) top = shares[k]; // taken out below, so that nothing underflows
  }
  for (let k = 0; k < K; k++) total += shares[k] = Math.exp(shares[k] - top);
  for (let k = 0; k < K; k++) shares[k] /= total;
  return shares;
}

/** The mean of component k in q(x0 | x_t, c): from its mode m some way towards where x_t points. */
const component_mean = (m, x_t, t, gain) =>
  [m[0] + gain * (x_t[0] - alpha(t) * m[0]), m[1] + gain * (x_t[1] - alpha(t) * m[1])];

/** q(x0 | x_t, c), again a mixture: {shares [K], means [K][2]}. */
function posterior(q, x_t, t, c) {
  const gain = gain_of(q, t);
  return { shares: [...shares_of(q, x_t, t, c)], means: q.m.map((m) => component_mean(m, x_t, t, gain)) };
}

/** E[x0 | x_t, c]: what a perfect network answers (Eq. 4). */
function posterior_mean(q, x_t, t, c) {
  const shares = shares_of(q, x_t, t, c);
  let x = 0, y = 0; // the mean of the modes
  for (let k = 0; k < shares.length; k++) {
    x += shares[k] * q.m[k][0];
    y += shares[k] * q.m[k][1];
  }
  return component_mean([x, y], x_t, t, gain_of(q, t));
}

/** The component that a uniform number u picks. */
function pick(shares, u) {
  let k = 0;
  for (let below = shares[0]; u > below && k < shares.length - 1; below += shares[k]) k++;
  return k;
}

/** x0 ~ q(x0 | c), from a uniform number u and a normal point z. */
const draw_data = (q, c, u, z) => combine(1, q.m[pick(q.table[c], u)], q.std, z);

/** x0 ~ q(x0 | x_t, c): one of the data points that x_t could have come from. */
function draw_posterior(q, x_t, t, c, u, z) {
  const m = q.m[pick(shares_of(q, x_t, t, c), u)], std = sigma(t) * Math.sqrt(q.v / (alpha(t) ** 2 * q.v + sigma(t) ** 2));
  return combine(1, component_mean(m, x_t, t, gain_of(q, t)), std, z);
}

/** E_p[x0 | x_s, c] when p(x0 | c) is a list of answers (toy/ideal.py). At s = 0 nothing is hidden: x_s itself. */
function mean_of_answers(x_s, s, answers) {
  if (s === 0) return x_s;
  const logs = new Float64Array(answers.length); // loops, because the field asks this for all answers at every arrow
  let top = -Infinity;
  for (let n = 0; n < answers.length; n++) {
    const u = x_s[0] - alpha(s) * answers[n][0], w = x_s[1] - alpha(s) * answers[n][1];
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

// ---------------------------------------------------------------------------------------------------------------------
// What is said of samples (toy/measures.py)
// ---------------------------------------------------------------------------------------------------------------------

const OFF_MODES = 4; // a blend is farther than so many standard deviations from every mode of its prompt

const distance = (x, y) => Math.hypot(x[0] - y[0], x[1] - y[1]);

/** The standard deviations between a point and the nearest mode of condition c. */
const off_by = (q, x, c) => Math.min(...modes_of(q, c).map((m) => distance(x, m))) / q.std;

/** Whether a sample of condition c is a blend. */
const is_blend = (q, x, c) => off_by(q, x, c) > OFF_MODES;

/** The share of the points that are nearest to each mode of condition c. */
function mass_of(q, points, c) {
  const mass = modes_of(q, c).map(() => 0);
  for (const x of points) {
    const away = modes_of(q, c).map((m) => distance(x, m));
    mass[away.indexOf(Math.min(...away))] += 1 / points.length;
  }
  return mass;
}

/** The mean distance over all pairs of a point of `a` and a point of `b`; with `same`, over pairs of different ones. */
function mean_distance(a, b, same = false) {
  let total = 0;
  for (const [x, y] of a) for (const [u, w] of b) total += Math.sqrt((x - u) ** 2 + (y - w) ** 2);
  return total / (a.length * (b.length - (same ? 1 : 0)));
}

/** 2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased: 0 for equal distributions. */
function energy_distance(x, y, within_y = mean_distance(y, y, true)) {
  return 2 * mean_distance(x, y) - mean_distance(x, x, true) - within_y;
}
