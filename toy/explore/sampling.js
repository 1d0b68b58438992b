// "The problem" and "Sampling": the same noise through trained networks, side by side, at any number of steps.

const BUDGETS = [1, 2, 4, 8, 50]; // evaluations of the network
const SAMPLES = 300, REFERENCE = 1000; // points that are sampled; fresh data of a prompt to compare with
const OBJECTIVES = [
  { label: "flow matching", title: "Flow matching", shape: "circle" },
  { label: "control Delta = 0", title: "Control, Δ = 0", shape: "square" },
  { label: "Self-E", title: "Self-E", shape: "up" },
];
const LINES = { "flow matching": "flow", "control Delta = 0": "control", "Self-E": "self-e" }; // classes of style.css

// What both figures share: networks that are unpacked, runs that are made, fresh data.
const made = { networks: new Map(), runs: new Map(), truths: new Map() };
const MOST_RUNS_KEPT = 100;

/** The value of a name, made when it is first asked for. */
function once(map, name, make_it) {
  if (!map.has(name)) map.set(name, make_it());
  return map.get(name);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sampling and measuring
// ---------------------------------------------------------------------------------------------------------------------

/** The prompts in view: the chosen one, or all. */
const prompts_of = (c, q) => (c === q.C ? range(q.C) : [c]);

/** What names a run: everything that changes its points. */
const name_of = ({ layout, c, eta, s_rule, guidance, seed }, label, steps) =>
  JSON.stringify([layout, c, eta, s_rule, guidance, seed, label, steps]);

/** Fresh data of prompt c, their distance within themselves, the true masses. */
function truth_of(q, layout, c) {
  return once(made.truths, `${layout} ${c}`, () => {
    const data = data_points(q, c, REFERENCE, 11);
    return { data, within: mean_distance(data, data, true) };
  });
}

/** What is said of the samples x of prompt c: the measures of toy/measures.py. */
function measure(q, layout, x, c) {
  const { data, within } = truth_of(q, layout, c), mass = mass_of(q, x, c);
  return {
    blends: mean(x, (point) => +is_blend(q, point, c)),
    energy: energy_distance(x, data, within),
    mass_error: sum(mass, (share, mode) => Math.abs(share - q.weights[c][mode])) / 2,
    mass,
  };
}

/** Samples of one objective: {c [n], x [steps + 1][n], x0_hat [steps][n], blend [n], measures}. */
async function sample_run(world, set, label, steps, breathe) {
  const q = mixture(world.layouts[set.layout]), { weights, sampling } = world.networks;
  const V = await once(made.networks, `${set.layout} ${label}`, async () =>
    toy_network(await unpack(weights[set.layout][label])));
  const { s_rule } = { ...set, ...sampling[label] }; // flow matching has learned s = t only
  const prompts = prompts_of(set.c, q), each = SAMPLES / prompts.length;
  const run = { c: [], x: range(steps + 1).map(() => []), x0_hat: range(steps).map(() => []), blend: [], measures: [] };
  for (const c of prompts) {
    const draw_noise = (k) => normal_points(each, 12, set.seed, c, k + 1), noise = draw_noise(-1);
    run.x[0].push(...noise);
    let k = 0, last = noise;
    for await (const { x, x0_hat } of trajectory(V, noise, c, q.C, { ...set, steps, s_rule, draw_noise })) {
      run.x0_hat[k].push(...x0_hat);
      run.x[++k].push(...x);
      last = x;
      await breathe();
    }
    run.c.push(...last.map(() => c));
    run.blend.push(...last.map((point) => is_blend(q, point, c)));
    run.measures.push(measure(q, set.layout, last, c));
  }
  return run;
}

/** Fresh data, measured as if they had been sampled: the floor. */
function floor_of(q, layout, c) {
  const prompts = prompts_of(c, q), each = SAMPLES / prompts.length;
  return once(made.truths, `floor ${layout} ${c}`, () => ({
    measures: prompts.map((one) => measure(q, layout, data_points(q, one, each, 13), one)) }));
}

/** A measure of a run, averaged over its prompts. */
const average = (run, key) => mean(run.measures, (measures) => measures[key]);

/** Make the runs of a figure that are missing, those in sight first; a newer call stops an older one. */
async function make_runs(v) {
  const mine = v.working = {}, breathe = breather(() => v.working !== mine), set = { ...v.set };
  const budgets = [set.steps, ...v.budgets.filter((steps) => steps !== set.steps)];
  try {
    for (const steps of budgets) {
      for (const { label } of v.objectives) {
        const name = name_of(set, label, steps);
        if (made.runs.has(name)) continue;
        made.runs.set(name, await sample_run(v.world, set, label, steps, breathe));
        if (made.runs.size > MOST_RUNS_KEPT) made.runs.delete(made.runs.keys().next().value); // the oldest
        v.redraw();
      }
    }
  } catch (error) {
    if (!(error instanceof Stopped)) throw error;
  }
}

const run_of = (v, label, steps = v.set.steps) => made.runs.get(name_of(v.set, label, steps));

// ---------------------------------------------------------------------------------------------------------------------
// The panels
// ---------------------------------------------------------------------------------------------------------------------

/** The points of a run after `at` steps; between two steps they move in a straight line. */
function points_at(run, at) {
  const k = Math.min(Math.floor(at), run.x.length - 2), share = at - k;
  return run.x[k].map((point, n) => combine(1 - share, point, share, run.x[k + 1][n]));
}

/** The paths so far and faintly what was predicted on them; only the points before the first Play. */
function draw_run(context, v, run, { to }) {
  const { at, set: { steps, eta } } = v, done = at >= steps, now = points_at(run, at);
  const colours = COLOURS.map(colour_of), ink = colour_of("ink"), blend = (n) => done && run.blend[n];
  const past = v.paths ? run.x.slice(0, Math.floor(at) + 1) : [], small = context.canvas.clientWidth < 220;
  const order = range(now.length).sort((a, b) => blend(a) - blend(b)); // blends on top
  context.lineWidth = 0.8;
  context.globalAlpha = steps > 8 && eta !== 0 ? 0.08 : small ? 0.1 : 0.16; // fresh noise makes a thicket
  const places = [...past, now].map((points) => points.map(to));
  for (const n of order) {
    context.strokeStyle = colours[run.c[n]];
    context.beginPath();
    places.forEach((points, k) => (k ? context.lineTo(...points[n]) : context.moveTo(...points[n])));
    context.stroke();
  }
  // the last prediction that is not yet the sample itself
  const guess = run.x0_hat[Math.min(Math.floor(at), steps - (done && steps > 1 ? 2 : 1))];
  context.fillStyle = colour_of("predict");
  context.globalAlpha = 0.3;
  if (v.paths && !(done && steps === 1)) for (const point of guess) draw_point(context, to(point), small ? 1.4 : 2);
  context.globalAlpha = 0.9;
  context.lineWidth = small ? 0.8 : 1.6;
  for (const n of order) {
    context.fillStyle = colours[run.c[n]];
    context.strokeStyle = ink;
    draw_point(context, places.at(-1)[n], small ? 1.3 : 2.8, blend(n));
  }
  context.globalAlpha = 1;
}

/** All panels of a figure. */
function draw_paths(v) {
  const layout = v.world.layouts[v.set.layout], q = mixture(layout), box = window_of(layout);
  for (const { label } of v.objectives) {
    const panel = find(`figure[data-label="${label}"]`, v.panels), canvas = find("canvas", panel);
    if (!canvas.clientWidth) return;
    const { context, width } = fresh_canvas(canvas), scale = scale_of(box, width), run = run_of(v, label);
    draw_modes(context, q, v.set.c, scale, true);
    if (run) draw_run(context, v, run, scale);
    const ended = v.at >= v.set.steps; // before, nothing is a blend yet
    find("output", panel).textContent =
      !run ? "computing" : ended ? `${percent(average(run, "blends"))} blends` : "on the way";
  }
  const t = 1 - v.at / v.set.steps;
  v.play.textContent = v.playing ? "Pause" : "Play";
  if (v.scrub) {
    set(v.scrub, { max: v.set.steps });
    v.scrub.value = v.at;
    v.moment.textContent = `step ${v.at.toFixed(1)} of ${v.set.steps}, t = ${t.toFixed(2)}`;
  }
}

/** Move along the steps, from the start if the end is reached; some seconds for the whole way, or at once (still). */
function play_paths(v) {
  v.playing = !v.playing;
  v.paths = true;
  if (v.playing && v.at >= v.set.steps) v.at = 0;
  const seconds = Math.min(1 + v.set.steps, 6);
  let before = performance.now();
  const frame = (now) => {
    if (!v.playing) return;
    v.at = still() ? v.set.steps
      : Math.min(v.set.steps, v.at + (Math.max(0, now - before) / 1000 / seconds) * v.set.steps);
    before = now;
    v.playing = v.at < v.set.steps;
    draw_paths(v);
    requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
  v.redraw();
}

/** The panels of a figure, one for each objective. */
function add_panels(v) {
  v.panels.append(...v.objectives.map(({ label, title }) => {
    const canvas = make("canvas", { role: "img",
      "aria-label": `${title}: paths of ${SAMPLES} points from noise; blends are crosses` });
    return make("figure", { "data-label": label }, make("figcaption", {}, make("b", {}, title), make("output")),
      make("div", { class: "plane" }, canvas));
  }));
}

/** A figure of panels in the section `name`, with its player. `extra` says which objectives, budgets and settings. */
function add_paths(name, world, extra) {
  const v = { world, at: 0, playing: false, paths: false, working: null, ...extra };
  Object.assign(v, { panels: find(`#${name} .panels`), play: find(`#${name} .play`), scrub: find(`#${name} .scrub`),
    moment: find(`#${name} .moment`) });
  v.at = v.set.steps;
  v.redraw = once_a_frame(() => {
    draw_paths(v);
    v.after?.(v, mixture(world.layouts[v.set.layout]));
  });
  add_panels(v);
  v.play.onclick = () => play_paths(v);
  if (v.scrub) {
    v.scrub.oninput = () => {
      v.playing = false;
      v.paths = true;
      v.at = +v.scrub.value;
      v.redraw();
    };
  }
  when_near(v.panels, () => make_runs(v));
  redraw_when_needed(v.panels, v.redraw);
  return v;
}

/** "The problem": two networks, two plain steps of Eq. 22, nothing to set. */
function mount_problem(world) {
  const set = { layout: "between", c: 3, steps: 2, eta: 0, s_rule: 0, guidance: 1, seed: 1 };
  add_paths("problem", world, { set, budgets: [2], objectives: [OBJECTIVES[0], OBJECTIVES[2]] });
}

// ---------------------------------------------------------------------------------------------------------------------
// "Sampling": table, chart, controls
// ---------------------------------------------------------------------------------------------------------------------

const SAMPLING_SETTINGS = {
  layout: ["between", LAYOUTS], c: [3, [0, 1, 2, 3]], steps: [2, BUDGETS], eta: [0, [0, 0.5, 1, "renoise"]],
  s_rule: [0, [0, 0.25, 0.5, 0.75, 1]], guidance: [1, { from: 1, to: 5 }], seed: [1, { from: 0, to: 1e6, whole: true }],
  show: ["blends", ["blends", "energy"]],
};
let sampling = null;

/** The table under the panels, with fresh data as the floor. */
function write_results(v, q) {
  const { c, layout, steps } = v.set, one = c < q.C;
  const rows = [...v.objectives.map(({ label, title }) => [title, run_of(v, label)]),
    ["Fresh data", floor_of(q, layout, c)]];
  const cells = ([title, run]) => (run ? [title, percent(average(run, "blends")), average(run, "energy").toFixed(3),
    average(run, "mass_error").toFixed(2), ...(one ? [per_mode(run.measures[0].mass)] : [])] : [title, "", "", ""]);
  find("#per-mode").hidden = !one;
  find("#results").replaceChildren(...rows.map((row) => make("tr", {}, ...cells(row).map((text, i) =>
    make(i ? "td" : "th", i ? { class: "value" } : { scope: "row" }, text)))));
  find("#truth").textContent = `${SAMPLES} points, ${steps} step${steps > 1 ? "s" : ""}; ` +
    (one ? `true shares ${per_mode(q.weights[c])} %.` : "averaged over the prompts.");
}

/** Blends or distance against the number of steps, a line for each objective, a dotted one for fresh data. */
function draw_chart(v, q) {
  const svg = find("#chart"), { show, layout, c } = v.set, width = 380, height = 220, left = 46, bottom = 40;
  const lines = v.objectives.map((objective) => ({ ...objective,
    points: BUDGETS.map((steps, i) => ({ i, steps, run: run_of(v, objective.label, steps) }))
      .filter(({ run }) => run).map(({ i, steps, run }) => ({ i, steps, value: average(run, show) })) }));
  const floor = average(floor_of(q, layout, c), show);
  const most = Math.max(0.05, floor, ...lines.flatMap(({ points }) => points.map(({ value }) => value)));
  const tick = [0.05, 0.1, 0.2, 0.25, 0.5, 1, 2].find((size) => most / size <= 4) ?? 5, top = tick * Math.ceil(most / tick);
  const x = (i) => left + 22 + (i / (BUDGETS.length - 1)) * (width - left - 48);
  const y = (value) => 12 + (1 - Math.max(0, value) / top) * (height - bottom - 12);
  const ticks = range(Math.round(top / tick) + 1).map((i) => i * tick);
  place(find(".grid", svg), "line", ticks, (value) => ({ x1: left, x2: width - 12, y1: y(value), y2: y(value) }));
  const marks = [
    ...ticks.map((value) => [left - 6, y(value) + 4, show === "blends" ? percent(value) : value.toFixed(2), "end"]),
    ...BUDGETS.map((steps, i) => [x(i), height - bottom + 18, steps, "middle"]),
    [(left + width) / 2, height - 4, "steps", "middle"]];
  place(find(".ticks", svg), "text", marks, ([x_, y_, , anchor]) => ({ x: x_, y: y_, "text-anchor": anchor }))
    .forEach((text, i) => { text.textContent = marks[i][2]; });
  place(find(".floor", svg), "line", [floor], (value) => ({ x1: left, x2: width - 12, y1: y(value), y2: y(value) }));
  place(find(".curves", svg), "polyline", lines, ({ points, label }) => ({
    points: points.map(({ i, value }) => `${x(i)},${y(value)}`).join(" "), class: LINES[label] }));
  place(find(".dots", svg), "path", lines.flatMap(({ points, shape, label }) => points.map((p) => ({ ...p, shape, label }))),
    ({ i, value, shape, label, steps }) => ({ d: SHAPES[shape], class: LINES[label],
      transform: `translate(${x(i)},${y(value)}) scale(${steps === v.set.steps ? 7 : 4.5})` }));
  set(svg, { "aria-label": `${show === "blends" ? "Share of blends" : "Energy distance"} at 1, 2, 4, 8 and 50 steps` });
}

/** Take over settings, show the end of the new paths, and work out what is missing. */
function change_sampling(settings) {
  const v = sampling;
  Object.assign(v.set, settings);
  show_settings("sampling", v.set);
  v.redraw();
  if (Object.keys(settings).every((name) => name === "show")) return;
  v.playing = false;
  v.at = v.set.steps;
  if (v.near) make_runs(v);
}

/** The legend of the chart. */
function add_legend() {
  const glyph = (name, shape) => make("svg", { viewBox: "0 0 34 14", "aria-hidden": "true" },
    make("polyline", { points: "0,7 34,7", class: name }),
    ...(shape ? [make("path", { d: SHAPES[shape], transform: "translate(17,7) scale(4.5)", class: name })] : []));
  find("#chart-legend").append(
    ...OBJECTIVES.map(({ label, title, shape }) => make("span", {}, glyph(LINES[label], shape), ` ${title}`)),
    make("span", {}, glyph("floor"), " fresh data"));
}

function mount_sampling(world) {
  const set = declare("sampling", SAMPLING_SETTINGS, change_sampling);
  sampling = add_paths("sampling", world, { set, budgets: BUDGETS, objectives: OBJECTIVES,
    after: (v, q) => { write_results(v, q); draw_chart(v, q); } });
  bind("sampling");
  find("#new-noise").onclick = () => change_sampling({ seed: sampling.set.seed + 1 });
  add_legend();
  when_near(sampling.panels, () => { sampling.near = true; });
  change_sampling({});
}
