// "Pictures": the included model draws a prompt in 1, 2, 4 and 8 steps, in the browser, beside flow matching.

const PICTURE_STEPS = [1, 2, 4, 8];
const pictures = { drawing: 0, frames: new Map() };

// ---------------------------------------------------------------------------------------------------------------------
// sample.py
// ---------------------------------------------------------------------------------------------------------------------

/** A model to sample from: {config, V, text}. Prompts are remembered, since every step asks for the same two. */
async function picture_model({ config, weights }) {
  const network = denoiser.assemble(config.model, await unpack(weights));
  const encode = prompt_words.encoder(config.txt_len), known = new Map();
  return { config, network, text: (prompt) => once(known, prompt, () => encode(prompt)) };
}

/** The steps of one picture, with the noise of sample.generate's first one; the last x0_hat is the picture. */
async function* draw_picture({ config, network, text }, prompt, { seed, ...choices }, breathe = () => {}) {
  const { side, mu, t_max, guidance_space: space } = config, n = network.size.channels * side * side;
  const V = async ([x_t], t, s, cond) => [await denoiser.velocity(network, x_t, t, s, cond, breathe)];
  const draw_noise = (k) => [random.normal(seed, "sampling", [k + 1, 0], n)];
  const path = trajectory(V, draw_noise(-1), text(prompt), text(""), { mu, space, t_max, draw_noise, ...choices });
  for await (const { t, s, x_t, x0_hat } of path) yield { t, s, x_t: x_t[0], x0_hat: x0_hat[0] };
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

/** What has to be said of a prompt's words: those that are not read, and those that training has never shown. */
function remark_on(prompt, { txt_len }, vocabulary) {
  const all = prompt_words.split_words(prompt), read = all.slice(0, txt_len - 1), rest = all.slice(txt_len - 1);
  const unknown = [...new Set(read.filter((word) => !vocabulary.includes(word)))];
  const quoted = (list) => list.map((word) => `“${word}”`).join(", ");
  return [
    unknown.length ? `Not known: ${quoted(unknown)}. No caption of the training had ${unknown.length > 1 ? "them" : "it"}, ` +
      "so the model answers with something that it knows." : "",
    rest.length ? `Not read: ${quoted(rest)}. The model reads ${txt_len - 1} words.` : "",
  ].filter((part) => part).join(" ");
}

// ---------------------------------------------------------------------------------------------------------------------
// Showing
// ---------------------------------------------------------------------------------------------------------------------

const in_words = (steps) => `${steps} step${steps > 1 ? "s" : ""}`;

/** A picture on a canvas of its own size; CSS makes it larger without smoothing. */
function show_picture(canvas, x, side, text) {
  canvas.width = canvas.height = side;
  canvas.getContext("2d").putImageData(new ImageData(picture_bytes(x), side, side), 0, 0);
  canvas.setAttribute("aria-label", text);
}

const picture_canvas = () => make("canvas", { width: 1, height: 1, role: "img", "aria-label": "not drawn yet" });

/** What the prompt leaves open, and how the pictures are sampled. */
function show_aim(v) {
  const { prompt, eta, guidance, flow_guidance } = v.set;
  const { right = "" } = v.world.pictures.prompts.find((one) => one.prompt === prompt) ?? {};
  find("#aim").textContent = right;
  find("#picture-sampler").textContent = `Here η = ${eta}, guidance ${guidance} for Self-E and ${flow_guidance} for flow ` +
    "matching; in the plane above it was η = 0 and guidance 1 (none).";
}

/** The steps of the chosen picture, one by one. */
function show_film(v) {
  const { row, column } = v.set, { side } = v.models[v.rows[row].model].config;
  const frames = v.frames.get(`${row} ${column}`) ?? [];
  find("#film-title").textContent = `${v.rows[row].title}, ${in_words(column)}, one by one`;
  find("#film").replaceChildren(...frames.map(({ t, s, x_t, x0_hat }, k) => {
    const seen = picture_canvas(), answer = picture_canvas(), which = `step ${k + 1} of ${column}`;
    show_picture(seen, x_t, side, `x_t of ${which}`);
    show_picture(answer, x0_hat, side, `x0_hat of ${which}`);
    const item = make("li", {}, make("figure", {}, seen, make("figcaption", {}, `$x_t$, $t$ = ${t.toFixed(2)}`)),
      make("span", { class: "arrow" }, `↓ told $s$ = ${s.toFixed(2)}`),
      make("figure", {}, answer, make("figcaption", {}, "$x0_hat$")));
    typeset(item);
    return item;
  }));
  for (const { name, cells } of v.grid) {
    for (const [steps, { button }] of cells) button.setAttribute("aria-pressed", name === row && steps === column);
  }
}

/** The rows of pictures, flow matching first; each picture is a button that shows its steps. */
function add_grid(v) {
  v.grid = Object.entries(v.rows).map(([name, { title, note }]) => {
    const cells = new Map(PICTURE_STEPS.map((steps) => {
      const canvas = picture_canvas(), button = make("button", { type: "button" }, canvas, in_words(steps));
      Object.assign(canvas.dataset, { row: name, steps });
      button.onclick = () => change_pictures({ row: name, column: steps });
      return [steps, { button, canvas }];
    }));
    const line = make("div", { class: "picture-row", role: "group", "aria-label": title },
      make("p", {}, make("b", {}, title), " ", make("span", { class: "note" }, note)),
      ...[...cells.values()].map(({ button }) => button));
    typeset(line);
    find("#picture-grid").append(line);
    return { name, cells };
  });
}

/** What draws the same pictures in a terminal, but for the weights' rounding here. */
function command_of({ prompt, seed, guidance, s_rule, eta }, folder) {
  const quoted = `'${prompt.replaceAll("'", "'\\''")}'`;
  return `python sample.py --checkpoint ${folder} --prompt ${quoted} --seed ${seed} --steps ${PICTURE_STEPS.join(" ")} ` +
    `--guidance ${guidance} --s-rule ${s_rule} --eta ${eta}`;
}

// ---------------------------------------------------------------------------------------------------------------------
// Drawing
// ---------------------------------------------------------------------------------------------------------------------

/** All pictures of the prompt, from few steps to many; a newer call stops an older one. */
async function draw_all(v) {
  const { prompt, seed, eta, s_rule } = v.set, mine = ++v.drawing, breathe = breather(() => mine !== v.drawing);
  const status = find("#picture-state"), started = performance.now();
  let evaluations = 0;
  status.textContent = `Drawing “${prompt}” …`;
  find("#picture-remark").textContent = remark_on(prompt, v.models.self_e.config, v.world.pictures.vocabulary);
  find("#picture-command").textContent = command_of(v.set, v.world.pictures.folder);
  for (const { cells } of v.grid) for (const { button } of cells.values()) button.classList.add("pending");
  v.frames = new Map();
  try {
    for (const steps of PICTURE_STEPS) {
      for (const { name, cells } of v.grid) {
        const frames = [], { model, at_t } = v.rows[name], { button, canvas } = cells.get(steps);
        const guidance = v.set[at_t ? "flow_guidance" : "guidance"];
        const choices = { seed, steps, guidance, eta, s_rule: at_t ? 1 : s_rule };
        v.frames.set(`${name} ${steps}`, frames);
        for await (const frame of draw_picture(v.models[model], prompt, choices, breathe)) {
          frames.push(frame);
          evaluations += guidance === 1 ? 1 : 2;
        }
        const { side } = v.models[model].config, { title } = v.rows[name];
        show_picture(canvas, frames.at(-1).x0_hat, side, `${title}, ${in_words(steps)}: ${prompt || "no prompt"}`);
        button.classList.remove("pending");
        if (name === v.set.row && steps === v.set.column) show_film(v);
      }
    }
  } catch (error) {
    if (error instanceof Stopped) return;
    throw error;
  }
  status.textContent = `Drawn: “${prompt}”, seed ${seed}; ${evaluations} evaluations of the network, ` +
    `${((performance.now() - started) / evaluations).toFixed(0)} ms each.`;
}

/** Take over settings; other pictures are drawn, another choice of what to look at only shown. */
function change_pictures(settings) {
  const v = pictures;
  Object.assign(v.set, settings);
  show_settings("pictures", v.set);
  show_aim(v);
  if (!v.models) return; // not yet in sight
  if (Object.keys(settings).some((name) => name !== "row" && name !== "column")) draw_all(v);
  show_film(v);
}

function mount_pictures(world) {
  const v = pictures, { prompts, models: { self_e, flow } } = world.pictures, { guidance, eta, s_rule } = self_e.config;
  v.world = world;
  v.rows = {
    flow: flow
      ? { title: "Flow matching", note: "trained like Self-E, but for the objective", model: "flow", at_t: true }
      : { title: "As flow matching", note: "the same network, told $s = t$; by the paper much like flow matching (S.3.1)", model: "self_e", at_t: true },
    self_e: { title: "Self-E", note: "told a smaller $s$", model: "self_e", at_t: false },
  };
  const etas = [...new Set([0, 0.5, 1, "renoise", eta])], rules = [...new Set([0, 0.25, 0.5, 0.75, 1, s_rule])];
  // The page opens on the first prompt and seed 0, whatever they show: nothing was chosen by its looks.
  v.set = declare("pictures", {
    prompt: [prompts[0].prompt, "text"], seed: [0, { from: 0, to: 2 ** 53 - 1, whole: true }],
    guidance: [guidance, { from: 0, to: 20 }], flow_guidance: [(flow ?? self_e).config.guidance, { from: 0, to: 20 }],
    eta: [eta, etas], s_rule: [s_rule, rules],
    row: ["self_e", Object.keys(v.rows)], column: [2, PICTURE_STEPS],
  }, change_pictures);
  find("#picture-prompts").append(...prompts.map(({ prompt }) => make("button",
    { type: "button", "data-set": new URLSearchParams({ prompt }) }, prompt.replace("a photo of ", "") || "no prompt")));
  add_grid(v);
  bind("pictures");
  find("#pictures form").onsubmit = (event) => {
    event.preventDefault();
    change_pictures({ prompt: find("#picture-prompt").value });
  };
  find("#another").onclick = () => change_pictures({ seed: v.set.seed + 1 });
  change_pictures({});
  when_near(find("#picture-grid"), async () => {
    v.models = { self_e: await picture_model(self_e), flow: flow && await picture_model(flow) };
    show_film(v);
    draw_all(v);
  });
}
