// View 2, "Sampling": the same noise through three trained networks, side by side, at any number of steps.

const BUDGETS = [1, 2, 4, 8, 50]; // evaluations of the network
const SAMPLES = 300, REFERENCE = 1000; // points that are sampled; fresh data of a condition to compare with
const MOST_RUNS = 100; // runs that are kept in memory
const OFF_MODES = 4; // a blend is farther than so many standard deviations from every mode (toy/measures.py)
const OBJECTIVES = [
  { label: "flow matching", title: "Flow matching", note: "Eq. 3", symbol: d3.symbolCircle, colour: "blue",
    dash: null },
  { label: "control Delta = 0", title: "Control", note: "Eq. 19, Delta = 0", symbol: d3.symbolSquare, colour: "orange",
    dash: "7 4" },
  { label: "Self-E", title: "Self-E", note: "Eq. 19-20", symbol: d3.symbolTriangle, colour: "purple", dash: "2 3" },
];

// Things to try: settings (the paper's where nothing is said), and what to see there.
const EXAMPLES = [
  ["Two steps", { layout: "between", steps: 2 },
    "Flow matching leaves half of its points between the modes, Self-E a third. But Self-E's mass error is larger: " +
    "it favours the modes where the prompt is certain."],
  ["One step, s half-way", { layout: "between", steps: 1, s_rule: 0.5 },
    "At s = 0 Delta is always 0. Told s = 0.5 instead, one step of Self-E makes fewer blends: set s_rule to 0 and " +
    "compare."],
  ["The control keeps up", { layout: "ring", steps: 1 },
    "All modes have one norm. So Eq. 19 with Delta = 0, which evaluates nothing, does as well as Self-E."],
  ["Nothing to gain", { layout: "far", steps: 2 },
    "The other prompts are far away. So the classifier has nothing to say, and the three are alike."],
  ["Guidance", { layout: "between", steps: 1, guidance: 3 },
    "Guidance brings one step of flow matching to about the distance that Self-E has without guidance."],
  ["Fifty steps", { layout: "between", steps: 50 }, "With many small steps all three arrive; no evaluation is needed."],
];

const paths = {
  layout: "between", c: 0, steps: 2, eta: 1, s_rule: 0, guidance: 1, seed: 1, at: 2, playing: false,
  runs: new Map(), networks: new Map(), truths: new Map(), waiting: [], q: null, contours: null,
};

// ---------------------------------------------------------------------------------------------------------------------
// Sampling and measuring
// ---------------------------------------------------------------------------------------------------------------------

/** The conditions in view: the chosen one, or all. */
const conditions_of = (v) => (v.c === v.q.C ? d3.range(v.q.C) : [v.c]);

/** What names a run: everything that changes its points. */
const name_of = (v, label, steps) => JSON.stringify([v.layout, v.c, v.eta, v.s_rule, v.guidance, v.seed, label, steps]);

/** The network of an objective, unpacked when it is first asked for. */
function network(v, label) {
  const name = `${v.layout} ${label}`, { weights, shapes } = v.world.networks;
  if (!v.networks.has(name)) v.networks.set(name, toy_network(unpack(weights[v.layout][label], shapes)));
  return v.networks.get(name);
}

/** Fresh data of condition c, and their distance within themselves. */
function truth_of(v, c) {
  const name = `${v.layout} ${c}`;
  if (!v.truths.has(name)) {
    const data = data_points(v.q, c, REFERENCE, "reference");
    const shares = v.q.table[c].filter((share) => share > 0);
    v.truths.set(name, { data, within: mean_distance(data, data, true), shares });
  }
  return v.truths.get(name);
}

/** What is said of the samples x of condition c: the measures of toy/measures.py. */
function measure(v, x, c) {
  const { data, within, shares } = truth_of(v, c);
  const mass = shares.map((_, mode) => d3.mean(x, (point) => +(nearest_mode(v.q, point, c) === mode)));
  return {
    blends: d3.mean(x, (point) => +(off_by(v.q, point, c) > OFF_MODES)),
    energy: energy_distance(x, data, within),
    mass_error: d3.sum(mass, (share, mode) => Math.abs(share - shares[mode])) / 2,
    mass,
  };
}

/** Sample with one objective; yields after each evaluation, returns {c, frames [steps + 1][n], blend, measures}. */
function* sample_run(v, label, steps) {
  const { s_rule } = { ...v, ...v.world.networks.sampling[label] }; // flow matching knows s = t only
  const V = network(v, label), groups = conditions_of(v), each = SAMPLES / groups.length;
  const run = { c: [], frames: d3.range(steps + 1).map(() => []), blend: [], measures: [] };
  for (const c of groups) {
    const draw_noise = (k) => normal_points(each, "sampling", v.seed, c, k);
    const x = draw_noise(-1), choices = { steps, s_rule, eta: v.eta, guidance: v.guidance, draw_noise };
    run.frames[0].push(...x);
    let k = 0, last = x;
    for (const step of trajectory(V, x, c, v.q.C, choices)) {
      run.frames[++k].push(...step.x);
      last = step.x;
      yield;
    }
    run.c.push(...last.map(() => c));
    run.blend.push(...last.map((point) => off_by(v.q, point, c) > OFF_MODES));
    run.measures.push(measure(v, last, c));
  }
  return run;
}

/** A measure of a run, averaged over its conditions. */
const average = (run, key) => d3.mean(run.measures, (measures) => measures[key]);

/** Make the runs that are missing, the shown ones first, some milliseconds at a time, so that the page stays alive. */
function work(v) {
  const settings = { ...v };
  const wanted = [v.steps, ...BUDGETS.filter((steps) => steps !== v.steps)]
    .flatMap((steps) => OBJECTIVES.map(({ label }) => ({ label, steps, name: name_of(v, label, steps) })));
  v.waiting = wanted.filter(({ name }) => !v.runs.has(name))
    .map((job) => ({ ...job, going: sample_run(settings, job.label, job.steps) }));
  if (v.working) return;
  v.working = true;
  const some = () => {
    const until = performance.now() + 12;
    while (v.waiting.length && performance.now() < until) {
      const { done, value } = v.waiting[0].going.next();
      if (done) {
        const { name, steps } = v.waiting.shift();
        v.runs.set(name, value);
        if (v.runs.size > MOST_RUNS) v.runs.delete(v.runs.keys().next().value); // the oldest
        if (steps === v.steps) v.redraw();
        write_results(v);
      }
    }
    v.working = v.waiting.length > 0;
    if (v.working) setTimeout(some);
  };
  setTimeout(some);
}

// ---------------------------------------------------------------------------------------------------------------------
// Drawing
// ---------------------------------------------------------------------------------------------------------------------

/** The points of a run after `at` steps; between two steps they move in a straight line. */
function points_at(run, at) {
  const k = Math.min(Math.floor(at), run.frames.length - 2), share = at - k;
  return run.frames[k].map((point, n) => combine(1 - share, point, share, run.frames[k + 1][n]));
}

/** The paths so far and where the points are. What ends as a blend is red, and a cross instead of a dot. */
function draw_run(context, v, run, scale) {
  const now = points_at(run, v.at), past = run.frames.slice(0, Math.floor(v.at) + 1);
  const to = (point) => [scale.x(point[0]), scale.y(point[1])];
  const order = d3.sort(d3.range(now.length), (n) => run.blend[n]); // blends on top
  context.lineWidth = 0.8;
  for (const n of order) {
    const colour = colour_names(v)[run.blend[n] ? "red" : CONDITIONS[run.c[n]].colour];
    context.strokeStyle = context.fillStyle = colour;
    context.globalAlpha = v.steps > 8 && v.eta !== 0 ? 0.1 : 0.2; // fresh noise in every step makes a thicket
    context.beginPath();
    past.forEach((frame, k) => (k ? context.lineTo(...to(frame[n])) : context.moveTo(...to(frame[n]))));
    context.lineTo(...to(now[n]));
    context.stroke();
  }
  for (const n of order) {
    const [px, py] = to(now[n]);
    context.strokeStyle = context.fillStyle = colour_names(v)[run.blend[n] ? "red" : CONDITIONS[run.c[n]].colour];
    context.globalAlpha = 0.9;
    context.lineWidth = 1.6;
    context.beginPath();
    if (run.blend[n]) {
      context.moveTo(px - 3, py - 3); context.lineTo(px + 3, py + 3);
      context.moveTo(px - 3, py + 3); context.lineTo(px + 3, py - 3);
      context.stroke();
    } else {
      context.arc(px, py, 1.9, 0, 2 * Math.PI);
      context.fill();
    }
  }
  context.globalAlpha = 1;
}

/** The colours by name, read once for each drawing. */
function colour_names(v) {
  v.colours ??= Object.fromEntries(["blue", "orange", "green", "red"].map((name) => [name, colour_of(name)]));
  return v.colours;
}

/** All three panels. */
function draw_paths(v) {
  if (!document.querySelector("#panels canvas").clientWidth) return; // another tab is open
  v.colours = null;
  for (const { label } of OBJECTIVES) {
    const panel = d3.select(`#panels figure[data-label="${label}"]`);
    const { context, width } = fresh_canvas(panel.select("canvas").node()), scale = scales(v.box, width);
    const run = v.runs.get(name_of(v, label, v.steps));
    draw_data(context, v.contours, v.c, scale);
    if (run) draw_run(context, v, run, scale);
    panel.select("output").text(run ? `${percent(average(run, "blends"))} blends` : "computing");
  }
  const t = 1 - v.at / v.steps;
  d3.select("#moment").text(`step ${v.at.toFixed(1)} of ${v.steps}, t = ${t.toFixed(2)}`);
  d3.select("#scrub").property("max", v.steps).property("value", v.at);
  d3.select("#play").text(v.playing ? "Pause" : "Play").attr("aria-pressed", v.playing);
}

/** Shares as whole percents, "50 / 30 / 20". */
const in_percent = (shares) => shares.map((share) => Math.round(100 * share)).join(" / ");

/** The table under the panels, and the chart of blends at every number of steps. */
function write_results(v) {
  const run = (label, steps) => v.runs.get(name_of(v, label, steps));
  const rows = d3.select("#results tbody").selectAll("tr").data(OBJECTIVES).join("tr");
  const cells = ({ label, title }) => {
    const made = run(label, v.steps);
    if (!made) return [title, "", "", "", ""];
    const mass = made.measures.length > 1 ? "" : in_percent(made.measures[0].mass);
    return [title, percent(average(made, "blends")), average(made, "energy").toFixed(3),
      average(made, "mass_error").toFixed(2), mass];
  };
  rows.selectAll("td").data(cells).join("td").text((text) => text).attr("class", (_, i) => (i ? "value" : null));
  const shares = v.c < v.q.C ? truth_of(v, v.c).shares : null;
  d3.select("#truth").text(`${SAMPLES} points at N = ${v.steps}. ` +
    (shares ? `The data have ${in_percent(shares)} % in their modes.` : "Averaged over the prompts."));
  draw_chart(v, run);
}

/** The share of blends against the number of steps, one line for each objective. */
function draw_chart(v, run) {
  const svg = d3.select("#chart"), width = 380, height = 220, pad = { left: 40, right: 12, top: 12, bottom: 36 };
  const lines = OBJECTIVES.map((objective) => ({
    ...objective,
    points: BUDGETS.map((steps, i) => ({ i, steps, made: run(objective.label, steps) }))
      .filter(({ made }) => made).map((point) => ({ ...point, blends: average(point.made, "blends") })),
  }));
  const top = Math.max(0.1, d3.max(lines, ({ points }) => d3.max(points, ({ blends }) => blends) || 0));
  const x = d3.scalePoint(d3.range(BUDGETS.length), [pad.left + 14, width - pad.right - 14]);
  const y = d3.scaleLinear([0, top], [height - pad.bottom, pad.top]).nice(4);
  svg.attr("viewBox", `0 0 ${width} ${height}`).select(".grid").selectAll("line").data(y.ticks(4)).join("line")
    .attr("x1", pad.left).attr("x2", width - pad.right).attr("y1", y).attr("y2", y).attr("stroke", "var(--line)");
  svg.select(".ticks").selectAll("text")
    .data([...y.ticks(4).map((value) => ({ text: percent(value), x: pad.left - 6, y: y(value) + 4, anchor: "end" })),
      ...BUDGETS.map((steps, i) => ({ text: steps, x: x(i), y: height - pad.bottom + 17, anchor: "middle" })),
      { text: "steps", x: (pad.left + width) / 2, y: height - 3, anchor: "middle" }])
    .join("text").attr("x", (tick) => tick.x).attr("y", (tick) => tick.y).attr("text-anchor", (tick) => tick.anchor)
    .text((tick) => tick.text);
  const line = d3.line((point) => x(point.i), (point) => y(point.blends));
  svg.select(".lines").selectAll("path").data(lines).join("path").attr("fill", "none").attr("stroke-width", 2)
    .attr("stroke", ({ colour }) => `var(--${colour})`).attr("stroke-dasharray", ({ dash }) => dash)
    .attr("d", ({ points }) => line(points));
  svg.select(".points").selectAll("path")
    .data(lines.flatMap(({ points, symbol, colour }) => points.map((point) => ({ ...point, symbol, colour }))))
    .join("path")
    .attr("d", ({ symbol, steps }) => d3.symbol(symbol, steps === v.steps ? 130 : 60)())
    .attr("transform", (point) => `translate(${x(point.i)},${y(point.blends)})`)
    .attr("fill", ({ colour }) => `var(--${colour})`);
}

// ---------------------------------------------------------------------------------------------------------------------
// Controls
// ---------------------------------------------------------------------------------------------------------------------

/** Take over settings, show the end of the new paths, and work out what is missing. */
function choose(v, settings) {
  Object.assign(v, settings, { playing: false });
  if ("layout" in settings) {
    v.q = mixture(v.world.layouts[v.layout]);
    v.box = frame(v.q);
    v.contours = data_contours(v.q, v.box);
  }
  v.at = v.steps;
  d3.selectAll("#budgets button").attr("aria-pressed", (steps) => steps === v.steps);
  const fields = { "s-layout": "layout", "s-prompt": "c", eta: "eta", "s-rule": "s_rule", guidance: "guidance" };
  for (const [id, name] of Object.entries(fields)) d3.select(`#${id}`).property("value", v[name]);
  d3.select("#guidance-value").text(v.guidance.toFixed(1));
  work(v);
  write_results(v);
  v.redraw();
}

/** Move along the steps, from the start if the end is reached; some seconds for the whole way. */
function play(v) {
  v.playing = !v.playing;
  if (v.playing && v.at >= v.steps) v.at = 0;
  const seconds = Math.min(1 + 0.7 * v.steps, 6);
  let before = performance.now();
  const frame = (now) => {
    if (!v.playing) return;
    v.at = Math.min(v.steps, v.at + (Math.max(0, now - before) / 1000 / seconds) * v.steps);
    before = now;
    v.playing = v.at < v.steps;
    draw_paths(v);
    requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
  v.redraw();
}

/** The examples as buttons; one sets everything and says what to see. */
function add_examples(v) {
  const paper = { eta: 1, s_rule: 0, guidance: 1, c: v.q.C };
  for (const [title, settings, hint] of EXAMPLES) {
    d3.select("#examples").append("button").attr("type", "button").text(title).on("click", () => {
      choose(v, { ...paper, ...settings });
      d3.select("#example-hint").html(marked_up(hint));
    });
  }
}

/** The three panels with their captions, and the legend of the chart. */
function add_panels() {
  const figures = d3.select("#panels").selectAll("figure").data(OBJECTIVES).join("figure")
    .attr("data-label", ({ label }) => label);
  const captions = figures.append("figcaption");
  captions.append("span").html(({ title, note }) => `<b>${title}</b> <span class="note">${note}</span>`);
  captions.append("output");
  figures.append("div").attr("class", "plane").append("canvas").attr("role", "img")
    .attr("aria-label", ({ title }) => `${title}: paths of ${SAMPLES} points from noise; blends are red crosses`);
  const entries = d3.select("#chart-legend").selectAll("span").data(OBJECTIVES).join("span");
  const glyphs = entries.append("svg").attr("viewBox", "0 0 34 14").attr("aria-hidden", "true");
  glyphs.append("path").attr("d", "M0 7H34").attr("stroke-width", 2).attr("stroke", ({ colour }) => `var(--${colour})`)
    .attr("stroke-dasharray", ({ dash }) => dash);
  glyphs.append("path").attr("transform", "translate(17,7)").attr("d", ({ symbol }) => d3.symbol(symbol, 60)())
    .attr("fill", ({ colour }) => `var(--${colour})`);
  entries.append("span").text(({ title }) => ` ${title}`);
}

/** Bind the controls of view 2. world: {layouts, networks}, as toy/explore.py wrote it. */
function mount_paths(world) {
  const v = paths;
  v.world = world;
  v.redraw = once_a_frame(() => draw_paths(v));
  add_panels();
  d3.select("#budgets").selectAll("button").data(BUDGETS).join("button").attr("type", "button").text((steps) => steps)
    .attr("aria-label", (steps) => `${steps} steps`).on("click", (event, steps) => choose(v, { steps }));
  d3.select("#s-layout").on("change", (event) => choose(v, { layout: event.target.value }));
  d3.select("#s-prompt").on("change", (event) => choose(v, { c: +event.target.value }));
  d3.select("#eta").on("change", ({ target: { value } }) => choose(v, { eta: value === "renoise" ? value : +value }));
  d3.select("#s-rule").on("change", (event) => choose(v, { s_rule: +event.target.value }));
  d3.select("#guidance").on("input", (event) => choose(v, { guidance: +event.target.value }));
  d3.select("#new-noise").on("click", () => choose(v, { seed: v.seed + 1 }));
  d3.select("#play").on("click", () => play(v));
  d3.select("#scrub").on("input", (event) => {
    v.playing = false;
    v.at = +event.target.value;
    v.redraw();
  });
  choose(v, { layout: v.layout });
  add_examples(v);
  redraw_when_needed(document.querySelector("#panels canvas"), v.redraw);
}
