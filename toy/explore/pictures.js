// The pictures: the laptop model of checkpoints/laptop draws a prompt in 1, 2, 4 and 8 steps, in the browser.
//
// First sampler.py and the sampling part of sample.py, for one picture; then the page. A picture is a Float32Array
// [channels * side * side], as in Python. `breathe` is what network.js says.

// ---------------------------------------------------------------------------------------------------------------------
// The sampler: sampler.py
// ---------------------------------------------------------------------------------------------------------------------

/** sampler.time_grid: steps + 1 falling times from 1 to 0, linear and then warped (Eq. s.12). */
function picture_time_grid(steps, mu) {
  return Array.from({ length: steps + 1 }, (_, k) => {
    const odds = (1 - k / steps) * Math.exp(mu);
    return odds / (odds + k / steps);
  });
}

/** losses.one_step_estimate: x0_hat from a velocity (Eq. 6). */
const picture_one_step_estimate = (x_t, t, v) => x_t.map((x, i) => x - t * v[i]);

/** sampler.energy_preserving: `guided` at the norm of `conditional`. */
function picture_energy_preserving(guided, conditional) {
  const energy = (x) => x.reduce((sum, value) => sum + value * value, 0);
  const ratio = energy(guided) > 0 ? Math.sqrt(energy(conditional) / energy(guided)) : 0;
  return guided.map((value) => ratio * value);
}

/** sampler.predict: x0_hat with guidance; `model` is what picture_model gives, cond a prompt's { tokens, pooled }. */
async function picture_predict(model, x_t, t, s, cond, guidance, breathe) {
  const v_c = await picture_network.velocity(model.V, x_t, t, s, cond, breathe);
  if (guidance === 1) return picture_one_step_estimate(x_t, t, v_c);
  const v_null = await picture_network.velocity(model.V, x_t, t, s, model.text(""), breathe);
  const guide = (c, none) => picture_energy_preserving(none.map((value, i) => value + guidance * (c[i] - value)), c);
  if (model.config.guidance_space === "v") return picture_one_step_estimate(x_t, t, guide(v_c, v_null));
  return guide(picture_one_step_estimate(x_t, t, v_c), picture_one_step_estimate(x_t, t, v_null));
}

/** sampler.update: from time t to s (Eq. 22 at eta = 0). noise is read unless eta = 0 or s = 0. */
function picture_update(x_t, x0_hat, t, s, eta, noise) {
  const variance = s ** 2 * (1 - (((1 - t) * s) / ((1 - s) * t)) ** 2);  // of q(x_s | x_t, x0)
  const std = eta === "renoise" ? s : eta * Math.sqrt(variance);
  const kept = Math.sqrt(Math.max(s ** 2 - std ** 2, 0));
  return x_t.map((x, i) => {
    const eps_hat = (x - (1 - t) * x0_hat[i]) / t;
    return (1 - s) * x0_hat[i] + kept * eps_hat + (std > 0 ? std * noise[i] : 0);
  });
}

/**
 * sampler.trajectory, with the noise of sample.generate's first picture. Yields { t, s, x_t, x0_hat } for every step;
 * the last x0_hat is the picture. choices: { seed, steps, guidance, eta, s_rule }.
 */
async function* picture_trajectory(model, prompt, choices, breathe = () => {}) {
  const { seed, steps, guidance, eta, s_rule } = choices, { channels } = model.V.size, { side, mu } = model.config;
  const noise = (k) => picture_random.normal(seed, "sampling", [k + 1, 0], channels * side * side);
  const grid = picture_time_grid(steps, mu), cond = model.text(prompt);
  let x_t = noise(-1);
  for (let k = 0; k < steps; k++) {
    const t = grid[k], t_next = grid[k + 1], s = t_next + s_rule * (t - t_next);
    const x0_hat = await picture_predict(model, x_t, t, s, cond, guidance, breathe);
    if (!x0_hat.every(Number.isFinite)) {
      throw new PictureError("the network answers with what is no number: model.safetensors is damaged");
    }
    yield { t, s, x_t, x0_hat };
    x_t = picture_update(x_t, x0_hat, t, t_next, eta, eta !== 0 && t_next > 0 ? noise(k) : null);
  }
}

/**
 * encoders.Pixels.decode, then data.to_pictures: [3 * side * side] -> RGBA bytes, row after row. The array rounds and
 * clamps to 0 .. 255 by itself, halves to even as PyTorch does.
 */
function picture_bytes(x) {
  const pixels = x.length / 3, bytes = new Uint8ClampedArray(4 * pixels).fill(255);
  for (let i = 0; i < pixels; i++) {
    for (let c = 0; c < 3; c++) bytes[4 * i + c] = Math.fround(Math.fround(x[c * pixels + i] / 2 + 1) * 127.5);
  }
  return bytes;
}

// ---------------------------------------------------------------------------------------------------------------------
// The model: sample.load
// ---------------------------------------------------------------------------------------------------------------------

/** What sampling reads of config.json, and what it must be. Throws PictureError with one line. */
function picture_check(config) {
  const number = (low, high) => (value) => typeof value === "number" && low <= value && value <= high;
  const whole = (value) => Number.isInteger(value) && value > 0;
  const only = (name) => (value) => value === name;
  const needed = {
    model: ["an object", (value) => typeof value === "object" && value !== null],
    objective: ["self_e, the one that this page samples", only("self_e")],
    text_encoder: ["words, the one that this page has", only("words")],
    autoencoder: ["pixels, the one that this page has", only("pixels")],
    side: ["a whole number", whole], txt_len: ["a whole number of 4 or more", (value) => whole(value) && value >= 4],
    mu: ["a number", number(-10, 10)], guidance: ["from 0 to 100", number(0, 100)],
    eta: ['from 0 to 1, or "renoise"', (value) => value === "renoise" || number(0, 1)(value)],
    s_rule: ["from 0 to 1", number(0, 1)],
    guidance_space: ["v or x0", (value) => value === "v" || value === "x0"],
  };
  for (const [name, [what, right]] of Object.entries(needed)) {
    if (right(config?.[name])) continue;
    throw new PictureError(`config.json: ${name} must be ${what}, not ${JSON.stringify(config?.[name])}`);
  }
  const { channels, patch, axes, width, heads } = config.model;
  if (channels !== 3 || config.side % patch !== 0 || axes?.reduce((sum, n) => sum + n, 0) !== width / heads) {
    throw new PictureError("config.json does not describe a model of pictures: channels must be 3, side a multiple " +
      "of patch, and the axes must sum to width / heads");
  }
}

/**
 * A model to sample from: config.json as text and model.safetensors as an ArrayBuffer -> { config, V, text }. Prompts
 * are remembered, since every step asks for the same two.
 */
function picture_model(json, buffer) {
  let config;
  try {
    config = JSON.parse(json);
  } catch (error) {
    throw new PictureError(`config.json is not valid JSON (${error.message}): fetch it again`);
  }
  picture_check(config);
  const V = picture_network.assemble(config.model, picture_network.read_safetensors(buffer));
  const encode = picture_words.encoder(config.txt_len), known = new Map();
  const text = (prompt) => known.get(prompt) ?? known.set(prompt, encode(prompt)).get(prompt);
  return { config, V, text };
}

// ---------------------------------------------------------------------------------------------------------------------
// The page
// ---------------------------------------------------------------------------------------------------------------------
const mountPictures = (() => {
"use strict";

const FOLDER = "../checkpoints/laptop/";  // seen from toy/explore.html
const STEPS = [1, 2, 4, 8];
const PATIENCE = 12;  // milliseconds that the page computes without looking up
const SERVE = "python -m http.server", ADDRESS = "http://localhost:8000/toy/explore.html";

const PROMPTS = {
  "One shape, or two with a relation": [
    "a photo of a red circle", "a photo of a yellow ring", "a photo of a black cross",
    "a photo of a red circle left of a blue square", "a photo of a white square above a purple ring",
  ],
  "A pair never seen in training": ["a photo of a red triangle", "a photo of a blue ring"],
  "Harder: no relation, a count, an unknown word, no prompt": [
    "a photo of a green ring and a yellow cross", "a photo of three circles", "a photo of a green dog", "",
  ],
};

const CHOICES = `
<div class="panel picture-choices">
  <div class="field"><label for="picture-seed">Seed</label>
    <input id="picture-seed" name="seed" type="number" min="0" max="9007199254740991" step="1" value="0" required>
    <button type="button" name="another">Next seed</button></div>
  <div class="field"><label for="picture-guidance">Guidance w</label>
    <input id="picture-guidance" name="guidance" type="range" min="0" max="5" step="0.1">
    <output for="picture-guidance"></output>
    <small>1 is off</small></div>
  <div class="field"><label for="picture-s">Second time s</label>
    <select id="picture-s" name="s_rule">
      <option value="0">the next time</option>
      <option value="0.5">half-way</option>
      <option value="1">the same, s = t</option>
    </select>
    <small>told beside t (S.3.1); for one step, try half-way and w = 1 (Fig. S.4)</small></div>
  <div class="field"><label for="picture-eta">Fresh noise eta</label>
    <select id="picture-eta" name="eta">
      <option value="0">0, none (Eq. 22)</option>
      <option value="0.5">0.5</option>
      <option value="1">1, as q(x_s | x_t, x0)</option>
      <option value="renoise">all anew (Eq. 8)</option>
    </select>
    <small>how much of the noise is drawn anew after a step</small></div>
</div>`;

const PAGE = `
<p class="lead">The laptop model of this repository, computed in your browser. Weights, noise and sums are those of
<code>sample.py</code>: the same prompt and seed give the same picture, but for rounding.</p>
<p class="picture-state" role="status"></p>
<p class="picture-error" role="alert" hidden></p>
<div class="picture-chooser" hidden>
  <label for="picture-files">model.safetensors and config.json</label>
  <input id="picture-files" type="file" multiple accept=".safetensors,.json">
</div>
<div class="picture-studio" hidden>
  <form>
    <div class="row picture-prompt">
      <label for="picture-prompt">Prompt</label>
      <input id="picture-prompt" name="prompt" type="text" autocomplete="off" spellcheck="false" maxlength="300">
      <button type="submit" class="main">Draw</button>
    </div>
    <div class="picture-prompts"></div>
    <div class="picture-desk">
      <div>
        <div class="picture-columns" role="group" aria-label="Steps; the chosen number is shown one by one below"></div>
        <progress class="picture-progress" value="0" max="1" aria-label="Steps drawn"></progress>
      </div>
      ${CHOICES}
    </div>
  </form>
  <h2 class="picture-heading"></h2>
  <p class="note wide">In each step the network sees x_t and is told t and s. It predicts the clean picture, x0_hat
  (Eq. 6). The next x_t is made from both, at the next time (Eq. 22). The last x0_hat is the picture.</p>
  <ol class="picture-film"></ol>
  <p class="note picture-time"></p>
  <p class="note">The same pictures: <code class="picture-command"></code></p>
  <details class="note picture-other"><summary>Another model</summary>
    <p>Any Self-E model of <code>train.py</code> with the built-in text encoder, such as runs/laptop.</p></details>
</div>`;

/** What ends a drawing when a newer one has begun. */
class Stopped extends Error {}

/** A picture on a canvas of its own size; CSS makes it larger without smoothing. */
function show(canvas, x, side, label) {
  canvas.width = canvas.height = side;
  canvas.getContext("2d").putImageData(new ImageData(picture_bytes(x), side, side), 0, 0);
  canvas.setAttribute("aria-label", label);
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function make_canvas(label) {
  const canvas = make("canvas", { width: 1, height: 1 });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  return canvas;
}

/**
 * A `breathe` for network.js: gives the browser a turn every PATIENCE milliseconds, and throws Stopped when `stale`.
 * A message comes at once; a timer would wait 4 ms.
 */
function breather(stale) {
  let last = performance.now();
  const { port1, port2 } = new MessageChannel();
  return async () => {
    if (performance.now() - last < PATIENCE) return;
    await new Promise((resolve) => {
      port1.onmessage = resolve;
      port2.postMessage(0);
    });
    last = performance.now();
    if (stale()) throw new Stopped();
  };
}

const in_words = (steps) => `${steps} step${steps > 1 ? "s" : ""}`;
const quoted = (prompt) => `'${prompt.replaceAll("'", "'\\''")}'`;  // for a shell

// --- Reading ---------------------------------------------------------------------------------------------------------

async function fetch_file(name) {
  const failed = (why) =>
    new PictureError(`${FOLDER}${name} cannot be fetched (${why}): serve the folder of the repository`);
  let response;
  try {
    response = await fetch(FOLDER + name);
  } catch (error) {
    if (error instanceof TypeError) throw failed(error.message);  // what fetch throws without a connection
    throw error;
  }
  if (!response.ok) throw failed(response.status);
  return response;
}

/** The shipped model. Throws PictureError. */
async function fetch_model() {
  const [config, weights] = await Promise.all(["config.json", "model.safetensors"].map(fetch_file));
  return picture_model(await config.text(), await weights.arrayBuffer());
}

/** The model in the files that the reader chose. */
async function chosen_model(files) {
  const find = (ending) => Array.from(files).find((file) => file.name.endsWith(ending));
  const config = find(".json"), weights = find(".safetensors");
  if (!config || !weights) throw new PictureError("choose both files at once: model.safetensors and config.json");
  return picture_model(await config.text(), await weights.arrayBuffer());
}

// --- Showing ---------------------------------------------------------------------------------------------------------

/** What the form says. Throws PictureError for a seed that is none. */
function choices_of(form) {
  const { prompt, seed, guidance, s_rule, eta } = form.elements;
  if (!form.checkValidity()) throw new PictureError("the seed must be a whole number, 0 or more");
  return {
    prompt: prompt.value, seed: Number(seed.value), guidance: Number(guidance.value), s_rule: Number(s_rule.value),
    eta: eta.value === "renoise" ? "renoise" : Number(eta.value),
  };
}

/** Put the model's own choices into the form; one that has no entry gets one. */
function preset(form, config) {
  for (const name of ["s_rule", "eta"]) {
    const select = form.elements[name], value = String(config[name]);
    if (!Array.from(select.options).some((option) => option.value === value)) select.append(new Option(value, value));
    select.value = value;
  }
  const { guidance } = form.elements;
  guidance.max = Math.max(5, config.guidance);
  guidance.value = config.guidance;
}

function show_film(view) {
  const { frames, prompt } = view.drawn.get(view.chosen) ?? { frames: [], prompt: "" };
  view.find(".picture-heading").textContent = `${in_words(view.chosen)}, one by one`;
  const { side } = view.model.config;
  view.find(".picture-film").replaceChildren(...frames.map(({ t, s, x_t, x0_hat }, k) => {
    const seen = make_canvas(""), said = make_canvas("");
    show(seen, x_t, side, `x_t of step ${k + 1} of ${view.chosen}, at t = ${t.toFixed(2)}: ${prompt}`);
    show(said, x0_hat, side, `x0_hat of step ${k + 1} of ${view.chosen}: ${prompt}`);
    const name = "x0_hat" + (k + 1 < view.chosen ? "" : ", the\u00a0picture");
    return make("li", {}, make("strong", { textContent: `Step ${k + 1}` }),
      make("figure", {}, seen, make("figcaption", { textContent: `x_t, t\u00a0=\u00a0${t.toFixed(2)}` })),
      make("span", { className: "picture-arrow", textContent: `\u2193 s\u00a0=\u00a0${s.toFixed(2)}` }),
      make("figure", {}, said, make("figcaption", { textContent: name })));
  }));
}

function choose_column(view, steps) {
  view.chosen = steps;
  for (const [n, { button, mark }] of view.columns) {
    button.setAttribute("aria-pressed", String(n === steps));
    mark.textContent = n === steps ? "\u25be shown below" : "show its steps";
  }
  show_film(view);
}

function add_columns(view) {
  view.columns = new Map(STEPS.map((steps) => {
    const canvas = make_canvas(`${in_words(steps)}: not drawn yet`), mark = make("small");
    canvas.dataset.steps = steps;
    const button = make("button", { type: "button", onclick: () => choose_column(view, steps) },
      canvas, make("strong", { textContent: in_words(steps) }), mark);
    return [steps, { button, canvas, mark }];
  }));
  view.find(".picture-columns").append(...Array.from(view.columns.values(), ({ button }) => button));
}

function add_prompts(view) {
  for (const [title, prompts] of Object.entries(PROMPTS)) {
    const buttons = prompts.map((prompt) => make("button", {
      type: "button", textContent: prompt.replace("a photo of ", "") || "(no prompt)",
      onclick: () => { view.form.elements.prompt.value = prompt; redraw(view); },
    }));
    const id = `picture-prompts-${view.find(".picture-prompts").childElementCount}`;
    const group = make("div", { className: "row" }, make("span", { id, className: "note", textContent: title }),
      ...buttons);
    group.setAttribute("role", "group");
    group.setAttribute("aria-labelledby", id);
    view.find(".picture-prompts").append(group);
  }
}

/** What draws the same pictures in a terminal; `checkpoint` names the model if it is not the shipped one. */
function command(choices, checkpoint) {
  const rule = { 0: "next", 1: "same" }[choices.s_rule] ?? choices.s_rule;
  return `python sample.py${checkpoint} --prompt ${quoted(choices.prompt)} --seed ${choices.seed} ` +
    `--steps ${STEPS.join(" ")} --guidance ${choices.guidance} --s-rule ${rule} --eta ${choices.eta}`;
}

// --- Drawing ---------------------------------------------------------------------------------------------------------

/** All columns for what the form says, from few steps to many; a newer call stops an older one. */
async function draw(view) {
  const choices = choices_of(view.form), { prompt, guidance } = choices;
  const mine = ++view.drawing, branches = guidance === 1 ? 1 : 2;
  const breathe = breather(() => mine !== view.drawing);
  const progress = view.find(".picture-progress"), started = performance.now();
  progress.max = STEPS.reduce((sum, steps) => sum + steps, 0);
  progress.value = 0;
  view.drawn = new Map();
  for (const { button } of view.columns.values()) button.classList.add("pending");
  view.say(`Drawing "${prompt}" \u2026`);
  view.find(".picture-command").textContent = command(choices, view.checkpoint);
  view.find("output").textContent = guidance;
  for (const steps of STEPS) {
    const frames = [], { canvas, button } = view.columns.get(steps);
    view.drawn.set(steps, { frames, prompt });
    for await (const frame of picture_trajectory(view.model, prompt, { ...choices, steps }, breathe)) {
      frames.push(frame);
      progress.value += 1;
      if (steps === view.chosen) show_film(view);
    }
    show(canvas, frames.at(-1).x0_hat, view.model.config.side, `${prompt || "no prompt"}, ${in_words(steps)}`);
    button.classList.remove("pending");
  }
  const milliseconds = (performance.now() - started) / (progress.max * branches);
  view.find(".picture-time").textContent = `${progress.max * branches} evaluations of the network, ` +
    `${milliseconds.toFixed(0)} ms each here. Guidance w = 1 needs one evaluation a step, any other two.`;
  view.say(`Drawn: "${prompt}", seed ${choices.seed}.`);
}

/** Do something that may fail, and tell the reader of a failure in one line. Defects of ours go to the console too. */
async function attempt(view, task) {
  view.complain("");
  try {
    await task();
  } catch (error) {
    if (error instanceof Stopped) return;
    if (view.model) view.say("");
    view.complain(error instanceof PictureError ? error.message : `something went wrong: ${error.message}`);
    if (!(error instanceof PictureError)) throw error;
  }
}

const redraw = (view) => attempt(view, () => draw(view));

/** Show a model that has been read, and what it draws. */
async function open(view, model, checkpoint) {
  Object.assign(view, { model, checkpoint, drawn: new Map() });
  view.drawing += 1;
  preset(view.form, model.config);
  view.find(".picture-studio").hidden = false;
  view.find(".picture-other").append(view.find(".picture-chooser"));
  choose_column(view, view.chosen);
  await draw(view);
}

/** Served pages fetch the model; pages opened as a file may not, and ask for it. */
async function start(view) {
  if (location.protocol === "file:") {
    view.find(".picture-chooser").hidden = false;
    view.find(".picture-state").replaceChildren("A page opened as a file may not read the model. Run ",
      make("code", { textContent: SERVE }), " in the repository\u2019s folder and open ",
      make("code", { textContent: ADDRESS }), ", or choose both files of checkpoints/laptop here:");
    return;
  }
  view.say("Fetching checkpoints/laptop \u2026");
  await attempt(view, async () => open(view, await fetch_model(), ""));
  if (!view.model) view.say("Or choose both files of a model here:");
  view.find(".picture-chooser").hidden = false;
}

/** Fill `element` with the view of the pictures, and fetch the model: to be called when the view is opened first. */
function mountPictures(element) {
  element.innerHTML = PAGE;
  const find = (selector) => element.querySelector(selector), form = find("form");
  const say = (text) => { find(".picture-state").textContent = text; };
  const complain = (text) => Object.assign(find(".picture-error"), { textContent: text, hidden: text === "" });
  const view = { element, find, form, say, complain, model: null, chosen: 4, drawing: 0, drawn: new Map() };
  add_columns(view);
  add_prompts(view);
  form.elements.prompt.value = Object.values(PROMPTS)[0][0];
  form.addEventListener("submit", (event) => { event.preventDefault(); redraw(view); });
  form.addEventListener("change", (event) => { if (event.target.name !== "prompt") redraw(view); });
  form.elements.guidance.addEventListener("input", (event) => { find("output").textContent = event.target.value; });
  form.elements.another.addEventListener("click", () => { form.elements.seed.stepUp(); redraw(view); });
  find("#picture-files").addEventListener("change", (event) =>
    attempt(view, async () => open(view, await chosen_model(event.target.files), " --checkpoint FOLDER")));
  start(view);
}

return mountPictures;
})();
