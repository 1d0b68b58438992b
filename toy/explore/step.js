// "One training step": scroll through losses.SelfE.forward, drag x_t, and see every quantity move.

const GRID = 23; // the field has GRID x GRID arrows
const CLOUD = 200, ANSWERS = 200; // draws of Eq. 8 that are shown; samples of p(x0 | c) for G_fake

// Each quantity of the step: its equation, what it is, the part of the step that makes it, and its marker.
const QUANTITIES = [
  { key: "x0", equation: "Eq. 1", meaning: "data", part: 1, shape: "star", filled: true },
  { key: "eps", equation: "Eq. 1", meaning: "noise", part: 1 },
  { key: "x_t", equation: "Eq. 1", meaning: "noisy data", part: 1, shape: "diamond", filled: true },
  { key: "x0_hat", equation: "Eq. 4, 6", meaning: "prediction", part: 2, shape: "circle", filled: true },
  { key: "x_s_hat", equation: "Eq. 8", meaning: "noised again", part: 3, shape: "square", filled: true },
  { key: "G_c", equation: "Eq. 11", meaning: "with the prompt", part: 4, shape: "up", filled: true },
  { key: "G_null", equation: "Eq. 11", meaning: "without it", part: 4, shape: "down", filled: false },
  { key: "G_fake", equation: "Eq. s.8", meaning: "own samples", part: 4, shape: "asterisk", filled: false },
  { key: "Delta", equation: "Eq. 14", meaning: "evaluation", part: 5 },
  { key: "x_self", equation: "Eq. 14", meaning: "corrected", part: 6, shape: "diamond", filled: false },
  { key: "lambda", equation: "Eq. 17", meaning: "weight", part: 7 },
  { key: "mix", equation: "not the paper’s", meaning: "share", part: 7 },
  { key: "x_tar", equation: "Eq. 18", meaning: "target", part: 7, shape: "square", filled: false },
  { key: "x_renorm", equation: "Eq. 19", meaning: "at the norm of x0", part: 8, shape: "square", filled: true },
  { key: "loss", equation: "Eq. 20-21", meaning: "loss", part: 9 },
];

// Lines between quantities, shown in the parts from .. to.
const LINKS = [
  { from: "x0", to: "x_t", parts: [1, 1] },
  { from: "x_t", to: "x0_hat", parts: [2, 2], arrow: true },
  { from: "x0_hat", to: "x_s_hat", parts: [3, 4], arrow: true },
  { from: "x_s_hat", to: "G_c", parts: [4, 4] },
  { from: "x_s_hat", to: "G_null", parts: [4, 4] },
  { from: "x_s_hat", to: "G_fake", parts: [4, 4] },
  { from: "G_c", to: "G_c + Delta", parts: [5, 6], arrow: true, strong: true, name: "Delta" },
  { from: "x0_hat", to: "x_self", parts: [6, 6], arrow: true, strong: true },
  { from: "x0", to: "x_self", parts: [7, 7] },
  { from: "origin", to: "x_renorm", parts: [8, 8] },
  { from: "x0_hat", to: "x_renorm", parts: [9, 9], arrow: true, strong: true },
];

const STEP_SETTINGS = {
  layout: ["between", LAYOUTS], c: [2, [0, 1, 2]], t: [0.9, { from: 0.02, to: 1 }], s: [0.3, { from: 0, to: 1 }],
  k: [1, { from: 0, to: 1 }], seed: [1302, { from: 0, to: 1e6, whole: true }], part: [1, range(9).map((i) => i + 1)],
  field: [true, [true, false]], cloud: [true, [true, false]],
  x0: [null, "point"], eps: [null, "point"], eps_s: [null, "point"],
};
const step = { set: null, now: null, n: null, lit: null, stop: () => {} };

/** x0, eps and eps_s of a seed. */
function draw_sample(q, c, seed) {
  const [eps, eps_s] = normal_points(2, 0, seed);
  return { x0: data_points(q, c, 1, 1, seed)[0], eps, eps_s };
}

/** What a model of posterior means draws for the prompt: the answers at t to ANSWERS noisy data points. */
function model_samples(q, c, t) {
  const eps = normal_points(ANSWERS, 2);
  return data_points(q, c, ANSWERS, 3).map((x0, i) => posterior_mean(q, add_noise(x0, t, eps[i]), t, c));
}

/** All numbers that the drawing depends on, so that a change of settings can be a motion. */
function state_of({ set: { layout, c, t, s, k, seed, part, ...moved }, world }) {
  const data = world.layouts[layout], sample = draw_sample(mixture(data), c, seed);
  return {
    data, box: window_of(data), t, s, k,
    x0: moved.x0 ?? sample.x0, eps: moved.eps ?? sample.eps, eps_s: moved.eps_s ?? sample.eps_s,
    field: part < 5 ? 0 : part < 7 ? 0.6 : 0.1, cloud: part >= 3 && part <= 6 ? 0.5 : 0, circle: part >= 8 ? 1 : 0,
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// Drawing
// ---------------------------------------------------------------------------------------------------------------------

/**
 * -Delta at every point of a grid of x_s, as arrows: longer is stronger, full length stands for 1 or more. They are
 * fainter where x_s_hat hardly ever falls.
 */
function draw_field(context, v, { to, unit }) {
  const { box, s, k, field } = v.now, spacing = (box[0][1] - box[0][0]) / GRID;
  const cloud = to(v.n.x0_hat.map((value) => alpha(s) * value)), spread = 2.5 * s * unit;
  const colour = colour_of("judge"), fading = context.createRadialGradient(...cloud, spread, ...cloud, 2 * spread);
  fading.addColorStop(0, colour);
  fading.addColorStop(1, `${colour}38`);
  context.strokeStyle = fading;
  context.lineWidth = 1.2;
  context.globalAlpha = field;
  context.beginPath();
  for (const x_s of grid_points(box, GRID)) {
    const { Delta } = evaluate(v.q, x_s, s, v.set.c, k, v.n.p), size = norm(Delta);
    if (size < 1e-3) continue;
    const length = spacing * Math.min(1, Math.sqrt(size)) * unit, [px, py] = to(x_s);
    const u = (-Delta[0] / size) * length, w = (Delta[1] / size) * length; // in pixels, where y points down
    context.moveTo(px - 0.42 * u, py - 0.42 * w);
    context.lineTo(px + 0.42 * u, py + 0.42 * w);
    context.moveTo(px + 0.18 * u + 0.16 * w, py + 0.18 * w - 0.16 * u);
    context.lineTo(px + 0.42 * u, py + 0.42 * w);
    context.lineTo(px + 0.18 * u - 0.16 * w, py + 0.18 * w + 0.16 * u);
  }
  context.stroke();
  context.globalAlpha = 1;
}

/** The data, the field, the cloud of x_s_hat and the circle of Eq. 19, on the canvas. */
function draw_ground(v) {
  const { context, width } = fresh_canvas(v.canvas), scale = scale_of(v.now.box, width), { cloud, circle, s, x0 } = v.now;
  draw_modes(context, v.q, v.set.c, scale);
  if (v.set.field && v.now.field > 0.01) draw_field(context, v, scale);
  if (v.set.cloud && cloud > 0.01) {
    context.fillStyle = colour_of("predict");
    context.globalAlpha = cloud;
    for (const eps_s of v.noise) draw_point(context, scale.to(add_noise(v.n.x0_hat, s, eps_s)), 1.9);
  }
  if (circle > 0.01) {
    context.globalAlpha = circle;
    context.strokeStyle = colour_of("target");
    context.lineWidth = 2;
    context.setLineDash([8, 5]);
    context.beginPath();
    context.arc(...scale.to([0, 0]), norm(x0) * scale.unit, 0, 2 * Math.PI);
    context.stroke();
    context.setLineDash([]);
    context.strokeStyle = colour_of("ink");
    context.beginPath();
    context.arc(...scale.to([0, 0]), 3.5, 0, 2 * Math.PI);
    context.stroke();
  }
  context.globalAlpha = 1;
}

/** The lines of this part; returns those with a name, as points to be labelled, and places along all of them. */
function draw_links(v, places) {
  const { part } = v.set;
  const links = LINKS.filter(({ from, to, parts: [first, last] }) => first <= part && part <= last &&
    places[from] && places[to] && distance(places[from], places[to]) > 3);
  place(v.links, "path", links, ({ from, to, arrow, strong, name }) => ({
    d: arrow ? arrow_path(places[from], short_of(places[from], places[to])) : `M${places[from]}L${places[to]}`,
    class: `${name ? "judge" : strong ? "target" : "given"} lines`, "stroke-width": strong ? 3 : 1.4,
    "stroke-dasharray": arrow ? null : "4 4" }));
  const along = (link, share) => combine(1 - share, places[link.from], share, places[link.to]);
  return {
    named: links.filter(({ name }) => name).map((link) => ({ key: link.name, at: along(link, 0.5) })),
    lines: links.flatMap((link) => range(11).map((i) => ({ at: along(link, i / 10), radius: 4 }))),
  };
}

/** Labels of points at one place become one: "G_c = G_null". */
function joined(points) {
  const groups = [];
  for (const point of points) {
    const same = groups.find(({ at }) => distance(at, point.at) < 2);
    if (same) same.key += ` = ${point.key}`;
    else groups.push({ ...point });
  }
  return groups;
}

/** How a marker is painted: filled, or as lines. */
const painted = ({ key, shape, filled }) => ({
  d: SHAPES[shape], class: `${SYMBOLS[key].role} ${filled ? "filled" : "lines"}`, "vector-effect": "non-scaling-stroke" });

/** Markers, labels and handles. The newest quantities are placed first, and drawn larger. */
function draw_marks(v) {
  const { n, set: { part } } = v, width = v.canvas.clientWidth, { to } = scale_of(v.now.box, width);
  const seen = QUANTITIES.filter((quantity) => quantity.shape && quantity.part <= part && n[quantity.key]);
  const places = Object.fromEntries(seen.map(({ key }) => [key, to(n[key])]));
  places.origin = to([0, 0]);
  places["G_c + Delta"] = part >= 5 ? to(combine(1, n.G_c, 1, n.Delta)) : null;
  set(v.svg, { viewBox: `0 0 ${width} ${width}` });
  const { named, lines } = draw_links(v, places);
  const points = seen.map((quantity) => ({
    ...quantity, at: places[quantity.key], radius: quantity.key in v.handles ? 18 : 11, strong: quantity.part === part }));
  place(v.marks, "path", points, (point) => ({ ...painted(point),
    transform: `translate(${point.at}) scale(${point.strong ? 9 : 6.5})` }));
  const now = points.filter(({ strong }) => strong);
  const origin = part >= 8 ? [{ key: "origin", at: places.origin, radius: 6 }] : [];
  write_labels(v.labels, place_labels(
    joined([...now, ...named, ...points.filter(({ strong }) => !strong), ...origin]), width, lines));
  place(v.halo, "circle", points.filter(({ key }) => key === v.lit), ({ at: [cx, cy] }) => ({ cx, cy, r: 20 }));
  for (const [key, handle] of Object.entries(v.handles)) {
    place_handle(handle, key, n[key], key === "x_s_hat" && v.set.s === 0 ? null : places[key]);
  }
}

/** The numbers, and what has to be said of the settings. */
function write_numbers(v) {
  const text = (value) => (value === null ? "off" : Array.isArray(value) ? `(${value.map(shown).join(", ")})`
    : value > 1e9 ? "infinite" : shown(value));
  for (const { key, part } of QUANTITIES) {
    v.rows[key].lastChild.textContent = text(v.n[key]);
    v.rows[key].className = part === v.set.part ? "now" : "";
  }
  find("#step-share").textContent = percent(v.n.mix);
  const [before, after] = [norm(v.n.x_tar), norm(v.n.x0)].map((length) => length.toFixed(2));
  find("#step-length").textContent = before === after ? `as it is, ${after} long`
    : `${+after > +before ? "longer" : "shorter"}, from ${before} to ${after}`;
  const w = +(1 / (1 - v.set.k)).toFixed(2), size = norm(v.n.eps);
  const remarks = [
    v.set.k === 1 ? "" : `k = ${v.set.k.toFixed(2)} is guidance w = 1 / (1 - k) = ${w} in Eq. 13.`,
    v.set.s === v.set.t ? "s = t: m is 0, and the target is the data point itself. This is flow matching." : "",
    size > 4 ? `This noise is ${size.toFixed(1)} long: training hardly ever draws more than 4.` : "",
  ];
  const remark = remarks.filter((part) => part).join(" ");
  if (v.remark !== remark) find("#step-remark").textContent = v.remark = remark;
}

/** Everything that is seen, from the numbers of this moment. */
function draw_step(v) {
  if (!v.canvas.clientWidth) return;
  const { data, t, s, k } = v.now, { c } = v.set;
  v.q = mixture(data);
  v.n = training_step(v.q, { ...v.now, s: Math.min(s, t), c, answers: k < 1 ? model_samples(v.q, c, t) : [] });
  draw_ground(v);
  draw_marks(v);
  write_numbers(v);
}

// ---------------------------------------------------------------------------------------------------------------------
// Changing things
// ---------------------------------------------------------------------------------------------------------------------

/** Take over settings; s stays below t, and another world brings another sample. Returns the card to be shown. */
function change_step(settings, at_once) {
  const v = step, fresh = ["layout", "c", "seed"].some((name) => name in settings);
  Object.assign(v.set, fresh ? { x0: null, eps: null, eps_s: null } : {}, settings);
  v.set.s = Math.min(v.set.s, v.set.t);
  show_settings("step", v.set);
  v.stop();
  const goal = state_of(v);
  if (at_once) {
    v.now = goal;
    draw_step(v);
  } else {
    v.stop = tween(v.now, goal, (state) => {
      v.now = state;
      draw_step(v);
    });
  }
  return "part" in settings ? v.cards[settings.part - 1] : null;
}

/** The next seed whose noisy points lie in the window. */
function next_seed({ set: { layout, c, t, seed }, world }) {
  const q = mixture(world.layouts[layout]), box = window_of(world.layouts[layout]);
  for (;;) {
    const { x0, eps } = draw_sample(q, c, ++seed), x_t = add_noise(x0, t, eps);
    if (x_t.every((value, i) => box[i][0] + 0.3 < value && value < box[i][1] - 0.3)) return seed;
  }
}

/** The part whose card has passed the reading line. */
function part_in_view(v) {
  const { right, bottom } = find("#step .stage").getBoundingClientRect();
  const beside = v.cards[0].getBoundingClientRect().left > right; // or else below
  const line = beside ? 0.55 * innerHeight : bottom + 0.35 * (innerHeight - bottom);
  return Math.max(1, v.cards.filter((card) => card.getBoundingClientRect().top < line).length);
}

/** One line of the table of numbers for each quantity, with its marker; the pointer on it lights the marker. */
function fill_table(v) {
  v.rows = Object.fromEntries(QUANTITIES.map((quantity) => {
    const glyph = make("svg", { viewBox: "-1.5 -1.5 3 3", "aria-hidden": "true" });
    if (quantity.shape) glyph.append(set(make("path"), painted(quantity)));
    const row = make("tr", {}, make("td", {}, glyph, ` $${quantity.key}$`),
      make("th", { scope: "row" }, make("code", {}, quantity.key)), make("td", {}, `${quantity.meaning}, ${quantity.equation}`),
      make("td", { class: "value", id: `number-${quantity.key}` }));
    row.onmouseenter = () => { v.lit = quantity.key; v.redraw(); };
    row.onmouseleave = () => { v.lit = null; v.redraw(); };
    return [quantity.key, row];
  }));
  const body = find("#numbers");
  body.append(...Object.values(v.rows));
  typeset(body);
}

/** Bind the figure. world: {layouts}, as toy/explore.py wrote it. */
function mount_step(world) {
  const v = Object.assign(step, { world, noise: normal_points(CLOUD, 4), handles: {} });
  v.set = declare("step", STEP_SETTINGS, change_step);
  Object.assign(v, add_plane(find("#step .plane"), "The plane: data as circles, the quantities of the step as markers",
    ["links", "halo", "marks", "labels", "handles"]));
  v.redraw = once_a_frame(() => draw_step(v));
  fill_table(v);
  const rounded_point = (point) => point.map(rounded);
  v.handles.x_s_hat = add_handle(v, "x_s_hat", (point) =>
    change_step({ eps_s: rounded_point(noise_of(point, v.set.s, v.n.x0_hat)) }, true));
  v.handles.x0 = add_handle(v, "x0", (point) => change_step({ x0: point }, true));
  v.handles.x_t = add_handle(v, "x_t", (point) =>
    change_step({ eps: rounded_point(noise_of(point, v.set.t, v.now.x0)) }, true));
  v.cards = find_all("#step .card");
  bind("step");
  find("#new-sample").onclick = () => change_step({ seed: next_seed(v) }, false);
  addEventListener("scroll", once_a_frame(() => {
    const part = part_in_view(v);
    if (part !== v.set.part) change_step({ part }, false);
  }), { passive: true });
  change_step({}, true);
  redraw_when_needed(v.canvas, v.redraw);
}
