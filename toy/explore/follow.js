// "Follow the target": toy/ideal.py, live. Each of 200 noisy points has a prediction of its own, which moves to its
// target round by round, with new data and new noise. What is left in the end is the objective's doing alone.

const POINTS = 200, ROUNDS = 300, RATE = 0.3; // RATE falls to 0, which averages out what each round draws
const FRESH = 600; // data points to compare with
const MOST_RUNS = 6; // of the list
const SECONDS = 6; // of a whole run

const FOLLOW_SETTINGS = {
  layout: ["between", LAYOUTS], c: [2, [0, 1, 2]], t: [0.9, { from: 0.1, to: 0.98 }], s: [0.3, { from: 0, to: 0.98 }],
  k: [1, [1, 0.9, 0.5, 0]], judge: [true, [true, false]], normalise: [true, [true, false]],
  wrong: [false, [true, false]],
};
const following = { set: null, runs: [], run: null, playing: false };

/** A run at its start: noisy points, their predictions, the share of blends so far. Blends are judged by right labels. */
function start_run({ set, world }) {
  const { layout, c, t, wrong } = set, layout_ = world.layouts[layout];
  const q = mixture(layout_, wrong ? 0.4 : 0), clean = mixture(layout_);
  const eps = normal_points(POINTS, 5), x_t = data_points(q, c, POINTS, 6).map((x0, n) => add_noise(x0, t, eps[n]));
  const x0_hat = x_t.map((point) => posterior_mean(q, point, t, c));
  const run = { set: { ...set }, q, clean, x_t, x0_hat, blends: [], fresh: data_points(clean, c, FRESH, 7) };
  note(run);
  return run;
}

/** Keep the share of blends of this round. */
const note = (run) => run.blends.push(mean(run.x0_hat, (x) => +is_blend(run.clean, x, run.set.c)));

/** One round for all points. */
function one_round(run) {
  const { q, x_t, set: { c, t, s, k, judge, normalise } } = run, round = run.blends.length;
  const u = random.uniform(0, "page", [8, round], POINTS), z = normal_points(POINTS, 9, round);
  run.x0_hat = follow(q, run.x0_hat, {
    x0: x_t.map((point, n) => draw_posterior(q, point, t, c, u[n], z[n])), eps_s: normal_points(POINTS, 10, round),
    t, s, c, k, judge, normalise, rate: RATE * (1 - (round - 1) / ROUNDS) });
  note(run);
}

const finished = (run) => run.blends.length > ROUNDS;

/** What a run asks for, in a few words. */
function name_of_run({ layout, c, t, s, k, judge, normalise, wrong }) {
  const evaluation = judge ? `Δ with k = ${k}` : "Δ = 0";
  return `${layout}, prompt ${c + 1}: ${evaluation}, ${normalise ? "Eq. 19" : "Eq. 18 alone"}` +
    `${wrong ? ", 40% of labels wrong" : ""}; t = ${t}, s = ${s}`;
}

// ---------------------------------------------------------------------------------------------------------------------
// Drawing
// ---------------------------------------------------------------------------------------------------------------------

function draw_follow(v) {
  const { run } = v, { c } = run.set;
  if (!v.canvas.clientWidth) return;
  const { context, width } = fresh_canvas(v.canvas), scale = scale_of(window_of(v.world.layouts[run.set.layout]), width);
  draw_modes(context, run.q, c, scale);
  for (const x of run.x0_hat) {
    const blend = is_blend(run.clean, x, c);
    context.fillStyle = context.strokeStyle = colour_of(blend ? "ink" : "predict");
    context.lineWidth = 1.6;
    draw_point(context, scale.to(x), 3.4, blend);
  }
  const blends = run.blends.at(-1), round = run.blends.length - 1;
  find("#follow-round").textContent =
    `round ${round}: ${percent(blends)} blends, ${per_mode(mass_of(run.clean, run.x0_hat, c))} % per mode`;
  find("#follow-play").textContent = v.playing ? "Pause" : finished(run) ? "Again" : "Play";
  draw_curves(v);
}

/** The share of blends, round by round: this run, and fainter the earlier ones of the list. */
function draw_curves(v) {
  const width = 340, height = 150, left = 42, right = 16, bottom = 24;
  const x = (round) => left + (round / ROUNDS) * (width - left - right), y = (share) => 8 + (1 - share) * (height - bottom - 8);
  const svg = find("#follow-chart"), all = [...v.runs.filter((run) => run !== v.run), v.run];
  place(find(".grid", svg), "line", [0, 0.5, 1], (share) => ({ x1: left, x2: width - right, y1: y(share), y2: y(share) }));
  const marks = [...[0, 0.5, 1].map((share) => [left - 6, y(share) + 4, percent(share), "end"]),
    ...[0, 100, 200, 300].map((round) => [x(round), height - 8, round, "middle"])];
  place(find(".ticks", svg), "text", marks, ([x_, y_, , anchor]) => ({ x: x_, y: y_, "text-anchor": anchor }))
    .forEach((text, i) => { text.textContent = marks[i][2]; });
  place(find(".curves", svg), "polyline", all, (run) => ({
    points: run.blends.map((share, i) => `${x(i).toFixed(1)},${y(share).toFixed(1)}`).join(" "),
    class: run === v.run ? "now" : run === v.lit ? "lit" : "before" }));
}

/** The list of finished runs, the newest on top; the pointer on one lights its curve, a click shows it again. */
function list_runs(v) {
  find("#follow-list").hidden = false;
  find("#follow-runs").replaceChildren(...[...v.runs].reverse().map((run) => {
    const name = make("button", { type: "button", class: "plain" }, name_of_run(run.set));
    name.onclick = () => change_follow({ ...run.set }, false);
    const row = make("tr", {}, make("td", {}, name), make("td", { class: "value" }, percent(run.blends[0])),
      make("td", { class: "value" }, percent(run.blends.at(-1))), make("td", { class: "value" }, run.energy.toFixed(2)),
      make("td", { class: "value" }, per_mode(run.mass)));
    row.onmouseenter = () => { v.lit = run; draw_curves(v); };
    row.onmouseleave = () => { v.lit = null; draw_curves(v); };
    return row;
  }));
}

// ---------------------------------------------------------------------------------------------------------------------
// Running
// ---------------------------------------------------------------------------------------------------------------------

/** Add a finished run to the list, once. */
function keep_run(v, run) {
  run.energy = energy_distance(run.x0_hat, run.fresh);
  run.mass = mass_of(run.clean, run.x0_hat, run.set.c);
  const name = name_of_run(run.set);
  v.runs = [...v.runs.filter((other) => name_of_run(other.set) !== name), run].slice(-MOST_RUNS);
  list_runs(v);
}

/** Go on with the run, at the pace of SECONDS for all rounds, or to the end at once where motion is not wanted. */
function play_follow(v) {
  v.playing = true;
  const run = v.run;
  let before = performance.now(), owed = still() ? ROUNDS : 0;
  const frame = (now) => {
    if (!v.playing || v.run !== run) return;
    owed += Math.max(0, now - before) / 1000 / SECONDS * ROUNDS;
    before = now;
    const until = performance.now() + (still() ? Infinity : 10); // a slow machine takes longer, and stays alive
    while (owed >= 1 && !finished(run) && performance.now() < until) {
      one_round(run);
      owed -= 1;
    }
    owed = Math.min(owed, 1.5);
    if (finished(run)) {
      v.playing = false;
      keep_run(v, run);
    }
    draw_follow(v);
    requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
  draw_follow(v);
}

/** Other settings begin a new run from the means, and play it. */
function change_follow(settings, at_once) {
  const v = following;
  Object.assign(v.set, settings);
  v.set.s = Math.min(v.set.s, v.set.t);
  show_settings("follow", v.set);
  v.playing = false;
  v.run = start_run(v);
  v.redraw();
  if (!at_once) play_follow(v);
}

function mount_follow(world) {
  const v = Object.assign(following, { world });
  v.set = declare("follow", FOLLOW_SETTINGS, change_follow);
  Object.assign(v, add_plane(find("#follow .plane"), `${POINTS} predictions; blends are crosses`, []));
  v.redraw = once_a_frame(() => draw_follow(v));
  bind("follow");
  find("#follow-play").onclick = () => {
    if (v.playing) {
      v.playing = false;
      v.redraw();
      return;
    }
    if (finished(v.run)) v.run = start_run(v);
    play_follow(v);
  };
  change_follow({}, true);
  redraw_when_needed(v.canvas, v.redraw);
}
