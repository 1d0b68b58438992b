// The method: the equations of losses.py and sampler.py under the same names, for one point [x, y] at a time.

// ---------------------------------------------------------------------------------------------------------------------
// The training objective (losses.py)
// ---------------------------------------------------------------------------------------------------------------------

/** a x + b y, value by value. */
const combine = (a, x, b, y) => x.map((value, i) => a * value + b * y[i]);
const norm = (x) => Math.hypot(...x);

/** Eq. 1: x_t = (1 - t) x0 + t eps. Eq. 8: the same line makes x_s_hat from x0_hat. */
const add_noise = (x0, t, eps) => combine(1 - t, x0, t, eps);

/** Eq. 4, 6: x0_hat = x_t - t V. */
const one_step_estimate = (x_t, t, V) => combine(1, x_t, -t, V);

/** Eq. s.6: Delta = k (G_null - G_c) + (1 - k) (G_fake - G_c). k = 1 is Eq. 14's, the classifier term alone. */
const self_evaluation = (G_null, G_c, G_fake, k) =>
  G_c.map((value, i) => k * (G_null[i] - value) + (k < 1 ? (1 - k) * (G_fake[i] - value) : 0));

/** Eq. 14: x_self = x0_hat - Delta. */
const pseudo_target = (x0_hat, Delta) => combine(1, x0_hat, -1, Delta);

/** Eq. 17: lambda = t / (1 - t) - s / (1 - s), infinite at t = 1. */
const lam = (t, s) => (s === t ? 0 : (t - s) / ((1 - t) * (1 - s)));

/** lambda / (1 + lambda), finite also at t = 1. */
const mix_weight = (t, s) => (t > s ? (t - s) / (t - s + (1 - t) * (1 - s)) : 0);

/** Eq. 18: x_tar = (1 - mix) x0 + mix x_self. */
const implicit_target = (x0, x_self, mix) => combine(1 - mix, x0, mix, x_self);

/** Eq. 19: x_tar at the norm of x0. A target of zero stays zero. */
function renormalise(x_tar, x0) {
  const ratio = norm(x_tar) > 0 ? norm(x0) / norm(x_tar) : 0;
  return x_tar.map((value) => ratio * value);
}

/** Eq. 20: the squared distance to the target. */
const target_loss = (x0_hat, target) => norm(combine(1, x0_hat, -1, target)) ** 2;

/** Eq. 21: w = 1 / t^2. */
const time_weight = (t) => 1 / t ** 2;

/** What the evaluation says at any x_s: the two or three posterior means, and Delta. p is a list of answers. */
function evaluate(q, x_s, s, c, k, p) {
  const G_c = posterior_mean(q, x_s, s, c), G_null = posterior_mean(q, x_s, s, q.C);
  const G_fake = k < 1 ? mean_of_answers(x_s, s, p) : null;
  return { G_c, G_null, G_fake, Delta: self_evaluation(G_null, G_c, G_fake, k) };
}

/**
 * One training step of Self-E, in the order of losses.SelfE.forward. The networks are perfect: each G is a posterior
 * mean.
 *
 * given: {x0, x_t, eps_s, t, s, c, k, answers}. The answers are samples of p(x0 | c), what this model draws for the
 * prompt; its answer here is added to them. G_fake is their exact posterior mean, as in toy/ideal.py: the auxiliary
 * network, learned to perfection.
 */
function training_step(q, { x0, x_t, eps_s, t, s, c, k, answers }) {
  const eps = combine(1 / t, x_t, -(1 - t) / t, x0); // Eq. 1, solved for the noise
  const x0_hat = posterior_mean(q, x_t, t, c);
  const p = [x0_hat, ...answers];
  const x_s_hat = add_noise(x0_hat, s, eps_s);
  const { G_c, G_null, G_fake, Delta } = evaluate(q, x_s_hat, s, c, k, p);
  const x_self = pseudo_target(x0_hat, Delta);
  const lambda = lam(t, s), mix = mix_weight(t, s);
  const x_tar = implicit_target(x0, x_self, mix);
  const x_renorm = renormalise(x_tar, x0);
  const loss = time_weight(t) * target_loss(x0_hat, x_renorm);
  return { x0, eps, x_t, x0_hat, p, x_s_hat, G_c, G_null, G_fake, Delta, x_self, lambda, mix, x_tar, x_renorm, loss };
}

// ---------------------------------------------------------------------------------------------------------------------
// Sampling (sampler.py). x is a list of points here; V(x, t, s, c) is the network, for all of them at once.
// ---------------------------------------------------------------------------------------------------------------------

/** Eq. s.12: times in [0, 1], moved towards 1 for mu > 0. */
function warp(t, mu) {
  const odds = t * Math.exp(mu);
  return odds / (odds + (1 - t));
}

/** steps + 1 falling times from 1 to 0. */
const time_grid = (steps, mu = 0) => Array.from({ length: steps + 1 }, (_, k) => warp(1 - k / steps, mu));

/** Sec. 3.4: a guided velocity, brought back to the norm of the conditional one. */
const energy_preserving = (guided, conditional) => renormalise(guided, conditional);

/** x0_hat of every point (Eq. 6), guided: V_null + w (V_c - V_null). */
function predict(V, x, t, s, c, c_null, guidance) {
  const v_c = V(x, t, s, c);
  if (guidance === 1) return x.map((point, n) => one_step_estimate(point, t, v_c[n]));
  const v_null = V(x, t, s, c_null);
  const guided = v_c.map((v, n) => energy_preserving(combine(guidance, v, 1 - guidance, v_null[n]), v));
  return x.map((point, n) => one_step_estimate(point, t, guided[n]));
}

/** Eq. 22 from time t to s for eta = 0; eta = 1 draws from q(x_s | x_t, x0_hat); "renoise" forgets x_t (Eq. 8). */
function update(x_t, x0_hat, t, s, eta, noise) {
  const eps_hat = combine(1 / t, x_t, -(1 - t) / t, x0_hat);
  const variance = s ** 2 * (1 - (((1 - t) * s) / ((1 - s) * t)) ** 2); // of q(x_s | x_t, x0)
  const std = eta === "renoise" ? s : eta * Math.sqrt(variance);
  const x_s = combine(1 - s, x0_hat, Math.sqrt(Math.max(s ** 2 - std ** 2, 0)), eps_hat);
  return std > 0 ? combine(1, x_s, std, noise) : x_s;
}

/**
 * Yield {t, x, x0_hat} after each of `steps` evaluations, from the points x at time 1; the last x is the sample.
 *
 * s_rule says where s_k lies, from t_(k+1) (0, the paper) to t_k (1). draw_noise(k) is the fresh noise of step k.
 */
function* trajectory(V, x, c, c_null, { steps, mu = 0, s_rule = 0, eta = 1, guidance = 1, draw_noise }) {
  const grid = time_grid(steps, mu);
  for (let k = 0; k < steps; k++) {
    const t = grid[k], t_next = grid[k + 1];
    const x0_hat = predict(V, x, t, t_next + s_rule * (t - t_next), c, c_null, guidance);
    const noise = eta !== 0 && t_next > 0 ? draw_noise(k) : [];
    x = x.map((point, n) => update(point, x0_hat[n], t, t_next, eta, noise[n]));
    yield { t: t_next, x, x0_hat };
  }
}
