// "Why": the prediction is a mean of all data points that x_t can have come from; many steps ask again on the way.

const MANY = 60; // steps of the dotted path
const FEW = 0.005; // the share of a mode that is still possible
const why = { set: null, now: null, n: null, stop: () => {} };

/** The path of many small steps (Eq. 22) from x_t to time 0, with perfect predictions. */
function many_steps(q, x_t, t, c) {
  const path = [x_t];
  for (let k = 0; k < MANY; k++) {
    const now = t * (1 - k / MANY), next = t * (1 - (k + 1) / MANY), x = path.at(-1);
    path.push(update(x, posterior_mean(q, x, now, c), now, next, 0));
  }
  return path;
}

/** What is said of a prediction that is `off` standard deviations from the nearest mode, given the modes' shares. */
function verdict(off, shares) {
  if (off > OFF_MODES) return `The prediction is a blend: ${off.toFixed(1)} standard deviations from the nearest mode.`;
  if (Math.max(...shares) > 0.99) return "One mode is left, and the prediction lies in it.";
  const possible = shares.filter((share) => share >= FEW).length;
  return `The prediction happens to lie in a circle; ${possible} modes are still possible.`;
}

/** Everything that is seen, from the numbers of this moment. */
function draw_why(v) {
  const width = v.canvas.clientWidth;
  if (!width) return;
  const { x0, eps, t, box } = v.now, { c } = v.set, q = v.q, scale = scale_of(box, width), { to } = scale;
  const x_t = add_noise(x0, t, eps), x0_hat = posterior_mean(q, x_t, t, c), { shares, means } = posterior(q, x_t, t, c);
  const path = many_steps(q, x_t, t, c);
  v.n = { x0, eps, x_t, x0_hat, end: path.at(-1) };
  const { context } = fresh_canvas(v.canvas);
  draw_modes(context, q, c, scale);

  set(v.svg, { viewBox: `0 0 ${width} ${width}` });
  const possible = means.map((point, k) => ({ at: to(point), share: shares[k] })).filter(({ share }) => share >= FEW);
  place(v.discs, "circle", possible, ({ at: [cx, cy], share }) => ({ cx, cy, r: 30 * Math.sqrt(share), class: "predict" }));
  place(v.links, "path", possible, ({ at, share }) => ({
    d: `M${to(x0_hat)}L${at}`, class: "predict lines", "stroke-width": 1 + 6 * share, opacity: 0.35 }));
  place(v.paths, "polyline", [path], (points) => ({ points: points.map(to).join(" "), class: "many lines" }));
  place(v.jump, "path", [0], () => ({ d: arrow_path(to(x_t), short_of(to(x_t), to(x0_hat), 12)),
    class: "predict lines", "stroke-width": 2.5 }));
  const marks = [["x0", "star"], ["x_t", "diamond"], ["x0_hat", "circle"]]
    .map(([key, shape]) => ({ key, shape, filled: true, at: to(v.n[key]), radius: key === "x0_hat" ? 12 : 18 }));
  place(v.marks, "path", [...marks, { key: "x0", shape: "circle", filled: true, at: to(v.n.end), small: true }],
    (mark) => ({ ...painted(mark), transform: `translate(${mark.at}) scale(${mark.small ? 4 : 8})` }));
  write_labels(v.labels, place_labels([...marks].reverse().map((mark) => ({ ...mark, strong: true })), width));
  const texts = shares.map((share, k) => ({ share, at: to(q.m[k]) })).filter(({ share }) => share >= FEW);
  const below = OFF_MODES * q.std * scale.unit + 15;
  place(v.shares, "text", texts, ({ at: [x, y] }) => ({ x, y: y + below, class: "share" }))
    .forEach((text, i) => { text.textContent = percent(texts[i].share); });
  for (const [key, handle] of Object.entries(v.handles)) place_handle(handle, key, v.n[key], to(v.n[key]));

  const told = verdict(off_by(q, x0_hat, c), shares);
  if (v.told !== told) find("#why-told").textContent = v.told = told;
}

/** Take over settings. t holds x0 and eps and moves x_t, by Eq. 1. */
function change_why(settings, at_once) {
  const v = why;
  Object.assign(v.set, "seed" in settings ? { x0: null, eps: null } : {}, settings);
  const sample = draw_sample(v.q, v.set.c, v.set.seed);
  const goal = { box: v.box, t: v.set.t, x0: v.set.x0 ?? sample.x0, eps: v.set.eps ?? sample.eps };
  show_settings("why", v.set);
  v.stop();
  if (at_once) {
    v.now = goal;
    draw_why(v);
    return;
  }
  v.stop = tween(v.now, goal, (state) => {
    v.now = state;
    draw_why(v);
  });
}

function mount_why(world) {
  const v = Object.assign(why, { world, handles: {}, q: mixture(world.layouts.between) });
  v.box = window_of(world.layouts.between);
  v.set = declare("why", {
    c: [0, [0, 1, 2]], t: [0.9, { from: 0.02, to: 1 }], seed: [5, { from: 0, to: 1e6, whole: true }],
    x0: [null, "point"], eps: [null, "point"],
  }, change_why);
  Object.assign(v, add_plane(find("#why .plane"), "A noisy point, the data it can have come from, and their mean",
    ["discs", "links", "paths", "jump", "shares", "marks", "labels", "handles"]));
  v.redraw = once_a_frame(() => draw_why(v));
  v.handles.x0 = add_handle(v, "x0", (point) => change_why({ x0: point }, true));
  v.handles.x_t = add_handle(v, "x_t", (point) =>
    change_why({ eps: noise_of(point, v.set.t, v.now.x0).map(rounded) }, true));
  bind("why");
  find("#why-sample").onclick = () =>
    change_why({ seed: next_seed({ set: { ...v.set, layout: "between" }, world }) }, false);
  change_why({}, true);
  redraw_when_needed(v.canvas, v.redraw);
}
