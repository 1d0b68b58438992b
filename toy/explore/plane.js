// View 1, "A training step": drag x_t, and see every quantity of losses.SelfE.forward move, in the paper's order.

const GRID = 23; // the field has GRID x GRID arrows
const CLOUD = 200, ANSWERS = 200; // draws of Eq. 8 that are shown; samples of p(x0 | c) for G_fake
const HANDLES = ["x_s_hat", "x0", "x_t"]; // what can be moved; the last one lies on top
const KEY_STEP = 0.05, FINE_KEY_STEP = 0.01; // arrow keys; with shift

// Each quantity of the step: its equation, what it is, the part of the step that makes it, and its marker.
const QUANTITIES = [
  { key: "x0", equation: "Eq. 1", meaning: "data", part: 1, symbol: d3.symbolStar, colour: "ink" },
  { key: "eps", equation: "Eq. 1", meaning: "noise", part: 1 },
  { key: "x_t", equation: "Eq. 1", meaning: "noisy data", part: 1, symbol: d3.symbolDiamond, colour: "ink" },
  { key: "x0_hat", equation: "Eq. 4, 6", meaning: "prediction", part: 2, symbol: d3.symbolCircle, colour: "purple" },
  { key: "x_s_hat", equation: "Eq. 8", meaning: "noised again", part: 3, symbol: d3.symbolSquare, colour: "ink" },
  { key: "G_c", equation: "Eq. 11", meaning: "with prompt", part: 4, symbol: d3.symbolTriangle, colour: "accent" },
  { key: "G_null", equation: "Eq. 11", meaning: "without", part: 4, symbol: d3.symbolTriangle2, colour: "ink" },
  { key: "G_fake", equation: "s.8", meaning: "own samples", part: 4, symbol: d3.symbolAsterisk, colour: "ink" },
  { key: "Delta", equation: "Eq. 14, s.6", meaning: "evaluation", part: 5 },
  { key: "x_self", equation: "Eq. 14", meaning: "pseudo-target", part: 6, symbol: d3.symbolPlus, colour: "ink" },
  { key: "lambda", equation: "Eq. 17", meaning: "weight", part: 7 },
  { key: "mix", equation: "Eq. 17", meaning: "share", part: 7 },
  { key: "x_tar", equation: "Eq. 18", meaning: "target", part: 7, symbol: d3.symbolSquare2, colour: "ink" },
  { key: "x_renorm", equation: "Eq. 19", meaning: "at |x0|", part: 8, symbol: d3.symbolWye, colour: "red" },
  { key: "loss", equation: "Eq. 20, 21", meaning: "times 1/t^2", part: 9 },
];

// The parts of the step: a title and one sentence. n holds the numbers, v the settings.
const PARTS = [
  ["Noise", () => "The data point x0 is mixed with noise, up to time t: x_t = (1 - t) x0 + t eps."],
  ["Predict", () => "A perfect network answers with the mean of all data that x_t could come from (discs: how likely " +
    "each mode is), x0_hat = E[x0 | x_t, c]: a blend."],
  ["Noise again", () => "The prediction is noised up to time s, x_s_hat = (1 - s) x0_hat + s eps_s; the cloud shows " +
    `${CLOUD} such draws.`],
  ["Judge", (n, v) => "At x_s_hat the network is asked for the clean point with the prompt, G_c, and without it, " +
    "G_null" + (v.k < 1 ? ", and for the mean of its own samples, G_fake." : ".")],
  ["Compare", (n, v) => (v.k < 1
    ? "Delta = k (G_null - G_c) + (1 - k) (G_fake - G_c); the field shows -Delta: towards the prompt, and away " +
      "from what the model itself draws."
    : "Delta = G_null - G_c; the field shows -Delta, which climbs log q(c | x_s): towards where the prompt is more " +
      "certain.")],
  ["Correct", () => "The pseudo-target moves the prediction against Delta, x_self = x0_hat - Delta, with no gradient."],
  ["Mix", (n) => `The target mixes data and correction, x_tar = (1 - mix) x0 + mix x_self; here ${percent(n.mix)} is ` +
    "correction."],
  ["Normalise", () => "x_tar is brought to the norm of x0: x_renorm lies where its ray meets the circle through x0."],
  ["Learn", () => "The loss pulls the prediction x0_hat to x_renorm, with weight 1 / t^2."],
];
const NOTHING_TO_JUDGE = " (At s = t, as for half of all samples, mix is 0: the target is x0 itself, Eq. 7.)";

// Lines between quantities, shown in the parts from .. to.
const LINKS = [
  { from: "x0", to: "x_t", parts: [1, 1] },
  { from: "x_t", to: "x0_hat", parts: [2, 2], arrow: true },
  { from: "x0_hat", to: "x_s_hat", parts: [3, 4], arrow: true },
  { from: "x_s_hat", to: "G_c", parts: [4, 4] },
  { from: "x_s_hat", to: "G_null", parts: [4, 4] },
  { from: "x_s_hat", to: "G_fake", parts: [4, 4] },
  { from: "G_c", to: "G_c + Delta", parts: [5, 6], arrow: true, strong: true, text: "Delta" },
  { from: "x0_hat", to: "x_self", parts: [6, 6], arrow: true, strong: true, text: "-Delta" },
  { from: "x0", to: "x_self", parts: [7, 7] },
  { from: "origin", to: "x_renorm", parts: [8, 8] },
  { from: "x0_hat", to: "x_renorm", parts: [9, 9], arrow: true, strong: true },
];

// Things to try: settings, the part of the step to look at, and what to see there.
const TRIES = [
  ["A blend among strangers", { layout: "between", c: 1, t: 0.9, s: 0.3, k: 1, seed: 93 }, 6,
    "x0_hat lies where other prompts have data. The evaluation notices: -Delta leads to where this one is certain."],
  ["Nothing to say", { layout: "far", c: 0, t: 0.9, s: 0.05, k: 1, seed: 7 }, 6,
    "x0_hat is no data point, but surely of this prompt. With and without it the answer is the same: Delta is 0."],
  ["Too much to say", { layout: "far", c: 0, t: 0.9, s: 0.6, k: 1, seed: 40 }, 8,
    "All arrows point the same way, away from the other prompts, and x_self is past the data. Eq. 19 holds it back."],
  ["The auxiliary term", { layout: "far", c: 0, t: 0.9, s: 0.3, k: 0, seed: 172 }, 6,
    "Only G_fake sees that samples of the model are blends: with k = 0 the arrows lead from the blend to the modes."],
  ["Silent at s = 0", { layout: "between", c: 0, t: 0.9, s: 0, k: 1, seed: 6 }, 6,
    "Without noise nothing is hidden, so prompts cannot differ: Delta is exactly 0. One-step sampling asks here."],
  ["One norm for all", { layout: "ring", c: 0, t: 0.95, s: 0.4, k: 1, seed: 102 }, 8,
    "All modes have one norm, so Eq. 19 alone brings a blend to the right radius. This layout flatters."],
];

/** Set the names of quantities as code. */
const NAMES = /\b(x0_hat|x_s_hat|x_self|x_tar|x_renorm|x_t|x_s|x0|eps_s|eps|G_\w+|Delta|mix|s_rule)\b/g;
const marked_up = (text) => text.replace(NAMES, "<code>$1</code>");
const percent = (share) => `${Math.round(100 * share)}%`;
const plane = {
  layout: "between", c: 1, t: 0.9, s: 0.3, k: 1, part: 1, seed: 93, field: true, cloud: true,
  x0: [0, 0], x_t: [0, 0], eps_s: [0, 0], q: null, contours: null, cloud_noise: [], answers: [], n: null,
};

/** New data, new noise: x0, eps and eps_s of this seed; x_t by Eq. 1. */
function draw_sample(v) {
  const [eps, eps_s] = normal_points(2, "sample", v.seed);
  v.x0 = data_points(v.q, v.c, 1, "sample", v.seed)[0];
  v.x_t = inside(v.box, add_noise(v.x0, v.t, eps));
  v.eps_s = eps_s;
}

/** What a model of posterior means draws for the prompt: the answers at t to ANSWERS noisy data points. */
function model_samples(q, c, t) {
  const eps = normal_points(ANSWERS, "answers");
  return data_points(q, c, ANSWERS, "answers").map((x0, i) => posterior_mean(q, add_noise(x0, t, eps[i]), t, c));
}

/** Take over settings; what depends on them follows: s stays below t, a new layout or prompt brings a new sample. */
function change(v, settings) {
  Object.assign(v, settings);
  if (v.s > v.t) v.s = v.t;
  if ("layout" in settings) {
    v.q = mixture(v.world.layouts[v.layout]);
    v.box = frame(v.q);
    v.contours = data_contours(v.q, v.box);
  }
  if ("layout" in settings || "c" in settings || "seed" in settings) draw_sample(v);
  if ("layout" in settings || "c" in settings || "t" in settings) v.answers = model_samples(v.q, v.c, v.t);
  v.redraw();
}

// ---------------------------------------------------------------------------------------------------------------------
// Drawing
// ---------------------------------------------------------------------------------------------------------------------

/** -Delta at every point of a grid of x_s, as arrows: longer is stronger, full length stands for 1 or more. */
function draw_field(context, v, { x, y }) {
  const spacing = (v.box.x[1] - v.box.x[0]) / GRID;
  context.strokeStyle = colour_of("accent");
  context.lineWidth = 1.2;
  context.globalAlpha = 0.6;
  context.beginPath();
  for (const x_s of grid_points(v.box, GRID)) {
    const { Delta } = evaluate(v.q, x_s, v.s, v.c, v.k, v.n.p), size = norm(Delta);
    if (size < 1e-3) continue;
    const length = spacing * Math.min(1, Math.sqrt(size)), [u, w] = Delta.map((value) => (-value / size) * length);
    const at = (along, across) => [x(x_s[0] + along * u - across * w), y(x_s[1] + along * w + across * u)];
    context.moveTo(...at(-0.42, 0));
    context.lineTo(...at(0.42, 0));
    context.moveTo(...at(0.18, 0.16));
    context.lineTo(...at(0.42, 0));
    context.lineTo(...at(0.18, -0.16));
  }
  context.stroke();
  context.globalAlpha = 1;
}

/** The data, the field and the cloud of x_s_hat, on the canvas. */
function draw_ground(v) {
  const { context, width } = fresh_canvas(v.canvas), scale = scales(v.box, width);
  draw_data(context, v.contours, v.c, scale);
  if (v.field && v.part >= 5) draw_field(context, v, scale);
  if (v.cloud && v.part >= 3 && v.part <= 6) {
    context.fillStyle = colour_of("ink");
    context.globalAlpha = 0.5;
    for (const eps_s of v.cloud_noise) {
      const [px, py] = add_noise(v.n.x0_hat, v.s, eps_s);
      context.fillRect(scale.x(px) - 1.25, scale.y(py) - 1.25, 2.5, 2.5);
    }
    context.globalAlpha = 1;
  }
}

/** The discs of part 2: where x_t could come from, in area as likely as they are large. */
function draw_discs(v, { x, y }) {
  const { shares, means } = posterior(v.q, v.x_t, v.t, v.c);
  const discs = v.part === 2 ? means.map((mean, k) => ({ mean, share: shares[k] })) : [];
  v.svg.select(".discs").selectAll("circle").data(discs).join("circle")
    .attr("cx", ({ mean }) => x(mean[0])).attr("cy", ({ mean }) => y(mean[1]))
    .attr("r", ({ share }) => 26 * Math.sqrt(share)).attr("fill", "var(--purple)").attr("fill-opacity", 0.3);
}

/** A little before the end of the way between two places, so that a marker does not hide the head of an arrow. */
function short_of(from, to, pixels = 9) {
  const length = Math.hypot(to[0] - from[0], to[1] - from[1]), share = length > 2 * pixels ? 1 - pixels / length : 1;
  return combine(1 - share, from, share, to);
}

/** The lines of this part, and in part 8 the circle through x0. */
function draw_links(v, places, { x, y }) {
  const apart = (from, to) => places[from] && places[to] && norm(combine(1, places[from], -1, places[to])) > 3;
  const links = LINKS.filter(({ parts: [first, last], from, to }) =>
    first <= v.part && v.part <= last && apart(from, to));
  const end = ({ from, to, arrow }) => (arrow ? short_of(places[from], places[to]) : places[to]);
  v.svg.select(".links").selectAll("line").data(links).join("line")
    .attr("x1", ({ from }) => places[from][0]).attr("y1", ({ from }) => places[from][1])
    .attr("x2", (link) => end(link)[0]).attr("y2", (link) => end(link)[1])
    .attr("stroke", "var(--ink)").attr("stroke-width", ({ strong }) => (strong ? 3 : 1.4))
    .attr("stroke-dasharray", ({ arrow }) => (arrow ? null : "4 4"))
    .attr("marker-end", ({ arrow }) => (arrow ? "url(#head)" : null));
  v.svg.select(".norm").attr("display", v.part >= 8 ? null : "none")
    .attr("cx", x(0)).attr("cy", y(0)).attr("r", x(norm(v.x0)) - x(0));
  v.svg.select(".origin").attr("d", d3.symbol(d3.symbolPlus, 40)()).attr("transform", `translate(${x(0)},${y(0)})`);
  return links.filter(({ text }) => text).map(({ text, from, to }) => ({
    key: text, text, at: [0, 1].map((i) => (places[from][i] + places[to][i]) / 2),
  }));
}

/** Fill a marker, or draw its lines if it is made of lines. */
function paint(markers) {
  const lines = ({ symbol }) => symbol !== d3.symbolCircle && d3.symbolsStroke.includes(symbol);
  const colour = (marker) => `var(--${marker.colour})`;
  markers.attr("fill", (marker) => (lines(marker) ? "none" : colour(marker)))
    .attr("stroke", (marker) => (lines(marker) ? colour(marker) : "var(--halo)"))
    .attr("stroke-width", (marker) => (lines(marker) ? 2.5 : 1.5));
}

/** Markers, labels and handles. The newest quantities are placed and drawn in bold. */
function draw_marks(v) {
  const { n } = v, width = v.canvas.clientWidth, scale = scales(v.box, width);
  const pixels = (point) => [scale.x(point[0]), scale.y(point[1])];
  const seen = QUANTITIES.filter(({ key, symbol, part }) => symbol && part <= v.part && n[key]);
  const places = Object.fromEntries(seen.map(({ key }) => [key, pixels(n[key])]));
  places.origin = pixels([0, 0]);
  places["G_c + Delta"] = v.part >= 5 ? pixels(combine(1, n.G_c, 1, n.Delta)) : null;
  v.svg.attr("viewBox", `0 0 ${width} ${width}`);
  draw_discs(v, scale);
  const arrows = draw_links(v, places, scale);

  const points = seen.map((quantity) => {
    const { key } = quantity;
    return { ...quantity, text: key, at: places[key], radius: HANDLES.includes(key) ? 18 : 11 };
  });
  const now = (point) => (point.part || v.part) === v.part;
  v.svg.select(".marks").selectAll("path").data(points, ({ key }) => key).join("path")
    .attr("d", ({ symbol, part }) => d3.symbol(symbol, part === v.part ? 190 : 110)())
    .attr("transform", ({ at }) => `translate(${at})`).call(paint);
  const labels = place_labels([...points.filter(now), ...arrows, ...points.filter((point) => !now(point))], width);
  v.svg.select(".labels").selectAll("text").data(labels, ({ key }) => key).join("text")
    .attr("x", ({ label }) => label.x).attr("y", ({ label }) => label.y + 4.5).attr("text-anchor", "middle")
    .classed("now", now).text(({ text }) => text);
  for (const key of HANDLES) {
    const free = places[key] && !(key === "x_s_hat" && v.s === 0);
    v.svg.select(`#handle-${key}`).attr("display", free ? null : "none")
      .attr("transform", free ? `translate(${places[key]})` : null)
      .attr("aria-label", `${key} at ${n[key].map(shown)}; drag it, or move it with the arrow keys`);
  }
}

/** The table of numbers, the sentence of this part, and the settings as their controls show them. */
function write_numbers(v) {
  const text = (value) => (value === null ? "off" : Array.isArray(value) ? `(${value.map(shown).join(", ")})`
    : value === Infinity ? "infinite" : shown(value));
  for (const { key, part } of QUANTITIES) {
    const row = v.rows[key];
    row.value.textContent = text(v.n[key]);
    row.line.className = part === v.part ? "now" : part > v.part ? "later" : "";
  }
  const [title, sentence] = PARTS[v.part - 1];
  d3.select("#part-title").text(`${v.part}. ${title}`);
  const said = marked_up(sentence(v.n, v) + (v.s === v.t && v.part >= 3 ? NOTHING_TO_JUDGE : ""));
  if (said !== v.said) d3.select("#say").html((v.said = said)); // it is read aloud when it changes, not in every frame
  d3.select("#back").property("disabled", v.part === 1);
  d3.select("#next").property("disabled", v.part === PARTS.length);
  d3.selectAll("#parts button").attr("aria-pressed", (_, i) => i + 1 === v.part)
    .attr("aria-current", (_, i) => (i + 1 === v.part ? "step" : null));
  for (const name of ["t", "s", "k"]) {
    d3.select(`#${name}`).property("value", v[name]);
    d3.select(`#${name}-value`).text(v[name].toFixed(2));
  }
  const w = +(1 / (1 - v.k)).toFixed(2);
  d3.select("#w-value").text(v.k === 1 ? "the classifier term alone" : `guidance w = 1 / (1 - k) = ${w} in Eq. 13`);
  d3.select("#layout").property("value", v.layout);
  d3.select("#prompt").property("value", v.c);
}

/** Everything that is seen, from the settings. */
function draw_plane(v) {
  if (!v.canvas.clientWidth) return; // another tab is open
  v.n = training_step(v.q, v);
  draw_ground(v);
  draw_marks(v);
  write_numbers(v);
}

// ---------------------------------------------------------------------------------------------------------------------
// Moving things
// ---------------------------------------------------------------------------------------------------------------------

/** Put x0, x_t or x_s_hat somewhere else. For x_s_hat it is the noise eps_s that changes. */
function move(v, key, point) {
  const place = inside(v.box, point);
  if (key === "x_s_hat") v.eps_s = combine(1 / v.s, place, -(1 - v.s) / v.s, v.n.x0_hat).map(rounded);
  else v[key] = place;
  v.redraw();
}

/** A handle that is dragged, or moved with the arrow keys when it has the focus. */
function add_handle(v, key) {
  const handle = v.svg.select(".handles").append("g").attr("class", "handle").attr("id", `handle-${key}`)
    .attr("tabindex", 0).attr("role", "button").attr("aria-roledescription", "movable point");
  handle.append("circle").attr("r", 17);
  handle.call(d3.drag().container(v.svg.node()).on("start", () => handle.node().focus()).on("drag", (event) => {
    const { x, y } = scales(v.box, v.canvas.clientWidth);
    move(v, key, [x.invert(event.x), y.invert(event.y)]);
  }).subject(() => {
    const { x, y } = scales(v.box, v.canvas.clientWidth);
    return { x: x(v.n[key][0]), y: y(v.n[key][1]) };
  }));
  handle.on("keydown", (event) => {
    const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!direction) return;
    event.preventDefault();
    const now = key === "x_s_hat" ? add_noise(v.n.x0_hat, v.s, v.eps_s) : v[key];
    move(v, key, combine(1, now, event.shiftKey ? FINE_KEY_STEP : KEY_STEP, direction));
  });
}

/** One line of the table of numbers for each quantity, with its marker. */
function fill_table(v) {
  v.rows = {};
  for (const { key, equation, meaning, symbol, colour } of QUANTITIES) {
    const line = d3.select("#numbers").append("tr");
    const glyph = line.append("td").append("svg").attr("viewBox", "-10 -10 20 20").attr("aria-hidden", "true");
    if (symbol) glyph.append("path").datum({ symbol, colour }).attr("d", d3.symbol(symbol, 110)()).call(paint);
    line.append("th").attr("scope", "row").append("code").text(key);
    line.append("td").text(equation);
    line.append("td").attr("class", "meaning").text(meaning);
    const value = line.append("td").attr("class", "value").attr("id", `number-${key}`);
    v.rows[key] = { line: line.node(), value: value.node() };
  }
}

/** The examples as buttons; one sets everything, opens its part of the step and says what to see. */
function add_tries(v) {
  for (const [title, settings, part, hint] of TRIES) {
    d3.select("#tries").append("button").attr("type", "button").text(title).on("click", () => {
      change(v, { ...settings, part });
      d3.select("#hint").html(marked_up(hint));
    });
  }
}

/** Bind the controls of view 1. world: {layouts}, as toy/explore.py wrote it. */
function mount_plane(world) {
  const v = plane;
  v.world = world;
  v.canvas = document.querySelector("#plane canvas");
  v.svg = d3.select("#plane svg");
  v.cloud_noise = normal_points(CLOUD, "cloud");
  v.redraw = once_a_frame(() => draw_plane(v));
  fill_table(v);
  for (const key of HANDLES) add_handle(v, key);
  for (const name of ["t", "s", "k"]) {
    d3.select(`#${name}`).on("input", ({ target }) => change(v, { [name]: +target.value }));
  }
  d3.select("#layout").on("change", (event) => change(v, { layout: event.target.value }));
  d3.select("#prompt").on("change", (event) => change(v, { c: +event.target.value }));
  for (const name of ["field", "cloud"]) {
    d3.select(`#${name}`).on("change", ({ target }) => change(v, { [name]: target.checked }));
  }
  d3.select("#new-sample").on("click", () => change(v, { seed: v.seed + 1 }));
  d3.select("#parts").selectAll("button").data(PARTS).join("button").attr("type", "button")
    .attr("aria-label", ([title], i) => `Part ${i + 1}: ${title}`).text((_, i) => i + 1)
    .on("click", (event, part) => change(v, { part: PARTS.indexOf(part) + 1 }));
  d3.select("#back").on("click", () => change(v, { part: Math.max(1, v.part - 1) }));
  d3.select("#next").on("click", () => change(v, { part: Math.min(PARTS.length, v.part + 1) }));
  add_tries(v);
  change(v, { layout: v.layout });
  redraw_when_needed(v.canvas, v.redraw);
}
