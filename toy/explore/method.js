// The method: the equations of losses.py and sampler.py under the same names. One file for all figures, in two
// dimensions as in pictures: a sample is an array of numbers, a point [x, y] or a picture.

/** a x + b y, value by value. */
const combine = (a, x, b, y) => x.map((value, i) => a * value + b * y[i]);
const sum = (list, of = (value) => value) => list.reduce((total, value, i) => total + of(value, i), 0);
const norm = (x) => Math.sqrt(sum(x, (value) => value * value));

// ---------------------------------------------------------------------------------------------------------------------
// The training objective (losses.py)
// ---------------------------------------------------------------------------------------------------------------------

/** The noise path of flow matching: t = 0 is data, t = 1 is noise. */
const alpha = (t) => 1 - t;
const sigma = (t) => t;

/** Eq. 1: x_t = alpha_t x0 + sigma_t eps. Eq. 8: the same line makes x_s_hat from x0_hat. */
const add_noise = (x0, t, eps) => combine(alpha(t), x0, sigma(t), eps);

/** Eq. 1, solved for the noise. */
const noise_of = (x_t, t, x0) => combine(1 / sigma(t), x_t, -alpha(t) / sigma(t), x0);

/** Eq. 4, 6: x0_hat = x_t - t V. */
const one_step_estimate = (x_t, t, V) => combine(1, x_t, -t, V);

/** Eq. s.6: Delta = k (G_null - G_c) + (1 - k) (G_fake - G_c). k = 1 is Eq. 14's, the classifier term alone. */
const self_evaluation = (G_null, G_c, G_fake, k) =>
  G_c.map((value, i) => k * (G_null[i] - value) + (k < 1 ? (1 - k) * (G_fake[i] - value) : 0));

/** Eq. 14: x_self = x0_hat - Delta. */
const pseudo_target = (x0_hat, Delta) => combine(1, x0_hat, -1, Delta);

/** Eq. 17: lambda = sigma_t / alpha_t - sigma_s / alpha_s; huge but finite at t = 1, 0 at s = t. */
const lam = (t, s) => (t - s) / Math.max(alpha(t) * alpha(s), Number.EPSILON ** 2);

/** Eq. 18: x_tar = (x0 + lambda x_self) / (1 + lambda), a mix in which nothing is large when lambda is. */
const implicit_target = (x0, x_self, lambda) => combine(1 / (1 + lambda), x0, lambda / (1 + lambda), x_self);

/** Eq. 19: x_tar at the norm of x0. A target that is zero but for rounding has no direction, and becomes zero. */
function renormalise(x_tar, x0) {
  const ratio = norm(x_tar) > 8 * Number.EPSILON * norm(x0) ? norm(x0) / norm(x_tar) : 0;
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

/** From a prediction to its target (Eq. 8 to 19), with perfect evaluators. `judge` false sets Delta to zero. */
function targets_of(q, x0_hat, { x0, eps_s, t, s, c, k, p, judge = true }) {
  const x_s_hat = add_noise(x0_hat, s, eps_s);
  const said = evaluate(q, x_s_hat, s, c, k, p);
  const x_self = judge ? pseudo_target(x0_hat, said.Delta) : x0_hat;
  const lambda = lam(t, s), x_tar = implicit_target(x0, x_self, lambda);
  return { x_s_hat, ...said, x_self, lambda, x_tar, x_renorm: renormalise(x_tar, x0) };
}

/**
 * One training step of Self-E, in the order of losses.SelfE.forward. The networks are perfect: each G is a posterior
 * mean.
 *
 * given: {x0, eps, eps_s, t, s, c, k, answers}. The answers are samples of p(x0 | c), what this model draws for the
 * prompt; its answer here is added to them. G_fake is their exact posterior mean, as in toy/ideal.py: the auxiliary
 * network, learned to perfection.
 */
function training_step(q, given) {
  const { x0, eps, t, c, answers } = given;
  const x_t = add_noise(x0, t, eps), x0_hat = posterior_mean(q, x_t, t, c), p = [x0_hat, ...answers];
  const targets = targets_of(q, x0_hat, { ...given, p });
  const mix = targets.lambda / (1 + targets.lambda); // the share of x_self in the target
  const loss = time_weight(t) * target_loss(x0_hat, targets.x_renorm);
  return { x0, eps, x_t, x0_hat, p, ...targets, mix, loss };
}

/**
 * One round of toy/ideal.py: every prediction moves the share `rate` of the way to its target. No network: each x_t has
 * a free prediction. x0 and eps_s are drawn anew for each round; p, the model's samples, are the predictions.
 */
function follow(q, x0_hat, { x0, eps_s, rate, normalise, ...given }) {
  return x0_hat.map((now, n) => {
    const { x_tar, x_renorm } = targets_of(q, now, { ...given, x0: x0[n], eps_s: eps_s[n], p: x0_hat });
    return combine(1 - rate, now, rate, normalise ? x_renorm : x_tar);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Sampling (sampler.py). x is a list of samples here; V(x, t, s, c) is the network, for all of them at once, and may
// answer with a promise. c and c_null are whatever V takes for a prompt.
// ---------------------------------------------------------------------------------------------------------------------

/** Eq. s.12: times in [0, 1], moved towards 1 for mu > 0. */
function warp(t, mu) {
  const odds = t * Math.exp(mu);
  return odds / (odds + (1 - t));
}

/** steps + 1 falling times from 1 to 0. */
const time_grid = (steps, mu = 0) => Array.from({ length: steps + 1 }, (_, k) => warp(1 - k / steps, mu));

/** Sec. 3.4: what guidance extrapolates, brought back to the norm of the conditional one. */
const energy_preserving = (guided, conditional) => renormalise(guided, conditional);

/** x0_hat of every sample (Eq. 6), guided: V_null + w (V_c - V_null), or the same of x0_hat. */
async function predict(V, x, t, s, c, c_null, guidance, space = "v") {
  const estimate = (v) => x.map((x_t, n) => one_step_estimate(x_t, t, v[n]));
  const v_c = await V(x, t, s, c);
  if (guidance === 1) return estimate(v_c);
  const v_null = await V(x, t, s, c_null);
  const guide = (conditional, null_) => conditional.map((a, n) =>
    energy_preserving(combine(guidance, a, 1 - guidance, null_[n]), a));
  return space === "v" ? estimate(guide(v_c, v_null)) : guide(estimate(v_c), estimate(v_null));
}

/** Eq. 22 from time t to t_next for eta = 0; eta = 1 draws from q(x_s | x_t, x0_hat); "renoise" forgets x_t (Eq. 8). */
function update(x_t, x0_hat, t, t_next, eta, noise) {
  const eps_hat = noise_of(x_t, t, x0_hat);
  const variance = sigma(t_next) ** 2 * (1 - ((alpha(t) * sigma(t_next)) / (alpha(t_next) * sigma(t))) ** 2);
  const std = eta === "renoise" ? sigma(t_next) : eta * Math.sqrt(variance);
  const x_s = combine(alpha(t_next), x0_hat, Math.sqrt(Math.max(sigma(t_next) ** 2 - std ** 2, 0)), eps_hat);
  return std > 0 ? combine(1, x_s, std, noise) : x_s;
}

/**
 * Yield {t, s, x_t, x0_hat, t_next, x} for each of `steps` evaluations, from the samples x at time 1; the last x is the
 * result. s_rule says where s_k lies, from t_(k+1) (0, the paper) to t_k (1). draw_noise(k) is the noise of step k.
 */
async function* trajectory(V, x, c, c_null, choices) {
  const { steps, mu = 0, s_rule = 0, eta = 1, guidance = 1, space, t_max = 1, draw_noise } = choices;
  const grid = time_grid(steps, mu);
  for (let k = 0; k < steps; k++) {
    const t = grid[k], t_next = grid[k + 1], s = t_next + s_rule * (t - t_next), x_t = x;
    const x0_hat = await predict(V, x_t, Math.min(t, t_max), Math.min(s, t_max), c, c_null, guidance, space);
    const noise = eta !== 0 && t_next > 0 ? draw_noise(k) : [];
    x = x_t.map((point, n) => update(point, x0_hat[n], t, t_next, eta, noise[n]));
    yield { t, s, x_t, x0_hat, t_next, x };
  }
}
