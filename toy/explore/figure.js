// What the figures share: elements, settings that can be linked to, motion, the plane, noise.

// ---------------------------------------------------------------------------------------------------------------------
// Elements
// ---------------------------------------------------------------------------------------------------------------------

const SVG = new Set(["svg", "g", "path", "circle", "line", "polyline", "text", "tspan", "title"]);
const find = (selector, within = document) => within.querySelector(selector);
const find_all = (selector, within = document) => [...within.querySelectorAll(selector)];

/** Attributes of an element; a function is a property (onclick), null takes the attribute away. */
function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element[name] = value;
    else if (value === null) element.removeAttribute(name);
    else element.setAttribute(name, value);
  }
  return element;
}

/** make("a", { href: "#step" }, "a text or elements") */
function make(tag, attributes = {}, ...children) {
  const element = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  element.append(...children);
  return set(element, attributes);
}

/** As many elements of a kind in a group as there are items, each with the attributes that `of` gives for its item. */
function place(group, tag, items, of) {
  while (group.childElementCount > items.length) group.lastChild.remove();
  while (group.childElementCount < items.length) group.append(make(tag));
  items.forEach((item, i) => set(group.children[i], of(item, i)));
  return [...group.children];
}

const percent = (share) => `${Math.round(100 * share)}%`;
const per_mode = (shares) => shares.map((share) => Math.round(100 * share)).join(" / ");
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
const range = (n) => Array.from({ length: n }, (_, i) => i);
const mean = (list, of) => sum(list, of) / list.length;

// ---------------------------------------------------------------------------------------------------------------------
// Settings: each figure declares what can be set; `#step?layout=far&t=0.5` in the address sets it
// ---------------------------------------------------------------------------------------------------------------------

const figures = {};

/**
 * Declare a figure: its name, {setting: [default, what it may be]}, and change(settings, at_once), which takes over
 * some of them. What it may be: a list of choices, {from, to} for a number, "text", or "point" for [x, y] or null.
 */
function declare(name, allowed, change) {
  figures[name] = { allowed, change };
  return Object.fromEntries(Object.entries(allowed).map(([key, [value]]) => [key, value]));
}

/** The value that a text stands for, or undefined. */
function parse_setting(text, what) {
  if (Array.isArray(what)) return what.find((choice) => String(choice) === text);
  if (what === "text") return text.slice(0, 300);
  const numbers = text.split(",").map(Number);
  if (text === "" || !numbers.every(Number.isFinite)) return undefined;
  if (what === "point") return numbers.length === 2 ? numbers : undefined;
  return clamp(what.whole ? Math.round(numbers[0]) : numbers[0], what.from, what.to);
}

/** "layout=far&t=0.5" -> {layout: "far", t: 0.5}: what is no setting of the figure, or has no such value, is left out. */
function parse_settings(name, text) {
  const { allowed } = figures[name], found = {};
  for (const [key, value] of new URLSearchParams(text)) {
    const parsed = key in allowed ? parse_setting(value, allowed[key][1]) : undefined;
    if (parsed !== undefined) found[key] = parsed;
  }
  return found;
}

/** Keep a figure's link at what it shows now. */
function share(name, settings) {
  const { allowed } = figures[name], shown = new URLSearchParams();
  for (const [key, [value]] of Object.entries(allowed)) {
    if (String(settings[key]) !== String(value)) shown.set(key, settings[key]);
  }
  const link = find(`#${name} .link`);
  if (link) link.href = `#${name}${shown.size ? `?${shown}` : ""}`;
}

/** Follow the address: set the figure that it names, and show it. */
function follow_address() {
  const [name, text = ""] = location.hash.slice(1).split("?");
  if (!(name in figures)) return;
  const element = figures[name].change(parse_settings(name, text), true) ?? find(`#${name}`);
  element.scrollIntoView();
}

/** Show under a figure what is said of the settings: the paragraph of the button, since it may be far below. */
function tell(name, button) {
  const told = find(`#${name} .told`);
  if (!told) return;
  const text = button ? button.parentNode.cloneNode(true) : make("p");
  text.firstElementChild?.replaceWith(make("b", {}, button.textContent));
  told.replaceChildren(...text.childNodes);
}

/** Bind buttons and inputs inside the figure `name`: data-set holds settings; an input sets what its name says. */
function bind(name) {
  const { allowed, change } = figures[name];
  for (const button of find_all(`#${name} button[data-set]`)) {
    button.onclick = () => {
      change(parse_settings(name, button.dataset.set.replaceAll(" ", "&")), false);
      tell(name, button);
      find(`#${name} .shown`).scrollIntoView({ block: "nearest", behavior: still() ? "auto" : "smooth" });
    };
  }
  for (const input of find_all(`#${name} [data-name]`)) {
    const key = input.dataset.name, slides = input.type === "range";
    const read = () => (input.type === "checkbox" ? String(input.checked) : input.value);
    const listen = () => {
      const value = parse_setting(read(), allowed[key][1]);
      if (value === undefined) return;
      change({ [key]: value }, slides);
      tell(name, null);
    };
    if (slides) input.oninput = listen;
    else input.onchange = listen;
  }
}

/** Show settings in the inputs of figure `name`; a number beside its slider. */
function show_settings(name, settings) {
  for (const input of find_all(`#${name} [data-name]`)) {
    const value = settings[input.dataset.name];
    if (input.type === "checkbox") input.checked = value;
    else if (input.type === "radio") input.checked = String(value) === input.value;
    else input.value = value;
    const output = find(`output[for="${input.id}"]`);
    if (output) output.textContent = value.toFixed(input.step.includes("0.0") ? 2 : 1);
  }
  share(name, settings);
}

// ---------------------------------------------------------------------------------------------------------------------
// Motion
// ---------------------------------------------------------------------------------------------------------------------

const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Between two values of one shape: numbers, and what is made of them. Anything else is already the new one. */
function between(a, b, share) {
  if (typeof a === "number" && typeof b === "number") return a + share * (b - a);
  if (Array.isArray(a) && Array.isArray(b)) return b.map((value, i) => between(a[i], value, share));
  if (a && b && typeof b === "object" && !Array.isArray(b)) {
    return Object.fromEntries(Object.entries(b).map(([key, value]) => [key, between(a[key], value, share)]));
  }
  return b;
}

/** Go from one state to another in 300 ms, calling draw(state) in each frame; returns what stops it. */
function tween(from, to, draw, milliseconds = 300) {
  if (still() || !from) {
    draw(to);
    return () => {};
  }
  let going = true, start = null;
  const frame = (now) => {
    if (!going) return;
    start ??= now;
    const share = Math.min(1, (now - start) / milliseconds);
    draw(share < 1 ? between(from, to, share * share * (3 - 2 * share)) : to);
    if (share < 1) requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
  return () => { going = false; };
}

/** Call `draw` once before the next frame, however often it is asked for. */
function once_a_frame(draw) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      draw();
    });
  };
}

/** Redraw when the size of an element changes, or the page turns from light to dark. */
function redraw_when_needed(element, draw) {
  new ResizeObserver(draw).observe(element);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

/** Do something once an element comes near the window. */
function when_near(element, start) {
  const watch = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    watch.disconnect();
    start();
  }, { rootMargin: "400px" });
  watch.observe(element);
}

/** What ends a computation when a newer one has begun. */
class Stopped extends Error {}

/**
 * To be awaited inside long computations: gives the browser a turn every 10 ms, and throws Stopped when `stale`. A
 * message comes at once; a timer would wait 4 ms.
 */
function breather(stale = () => false) {
  let last = performance.now();
  const { port1, port2 } = new MessageChannel();
  return async () => {
    if (performance.now() - last < 10) return;
    await new Promise((resolve) => {
      port1.onmessage = resolve;
      port2.postMessage(0);
    });
    last = performance.now();
    if (stale()) throw new Stopped();
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// The plane
// ---------------------------------------------------------------------------------------------------------------------

const LAYOUTS = ["between", "far", "ring"];
const COLOURS = ["prompt-0", "prompt-1", "prompt-2"], DASHES = [[], [7, 4], [2, 3]];

/** A colour of style.css by name, as the page shows it now (light or dark). */
const colour_of = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** A window on the plane: a square that holds the modes and, around the origin, most of the noise. */
function window_of({ means }) {
  const sides = [0, 1].map((i) => {
    const values = means.flat().map((m) => m[i]);
    return [Math.min(-2, ...values) - 0.6, Math.max(2, ...values) + 0.6];
  });
  const half = Math.max(...sides.map(([low, high]) => high - low)) / 2;
  return sides.map(([low, high]) => [(low + high) / 2 - half, (low + high) / 2 + half]);
}

/** From points of the plane to pixels of a square of the given width, and back. */
function scale_of(box, width) {
  const unit = width / (box[0][1] - box[0][0]);
  return {
    unit,
    to: ([x, y]) => [(x - box[0][0]) * unit, (box[1][1] - y) * unit],
    from: ([px, py]) => [box[0][0] + px / unit, box[1][1] - py / unit],
  };
}

/** n x n points, evenly spread over the window. */
function grid_points(box, n) {
  const along = ([low, high]) => range(n).map((i) => low + ((i + 0.5) * (high - low)) / n);
  return along(box[1]).flatMap((y) => along(box[0]).map((x) => [x, y]));
}

/** A canvas made as sharp as the screen; returns its context, cleared, and its width in CSS pixels. */
function fresh_canvas(canvas) {
  const width = canvas.clientWidth, ratio = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio)) canvas.width = canvas.height = Math.round(width * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, width);
  return { context, width };
}

/** The modes as circles of 2 and 4 standard deviations; outside of the larger ones of its prompt, a sample is a blend. */
function draw_modes(context, q, chosen, { to, unit }, coloured) {
  q.m.forEach((m, k) => {
    const c = Math.floor(k / q.M), own = c === chosen || chosen === q.C;
    context.strokeStyle = context.fillStyle = colour_of(coloured ? COLOURS[c] : own ? "ink" : "faint");
    for (const [radius, fill] of [[OFF_MODES, 0.1], [OFF_MODES / 2, 0.12]]) {
      context.beginPath();
      context.arc(...to(m), radius * q.std * unit, 0, 2 * Math.PI);
      context.globalAlpha = own ? fill : 0;
      context.fill();
      if (radius < OFF_MODES) continue;
      context.globalAlpha = own ? 0.9 : 0.55;
      context.setLineDash(DASHES[c]);
      context.lineWidth = own ? 1.5 : 1;
      context.stroke();
    }
  });
  context.globalAlpha = 1;
  context.setLineDash([]);
}

/** A dot, or a cross for a blend. */
function draw_point(context, [px, py], size, cross) {
  context.beginPath();
  if (cross) {
    context.moveTo(px - size, py - size); context.lineTo(px + size, py + size);
    context.moveTo(px - size, py + size); context.lineTo(px + size, py - size);
    context.stroke();
  } else {
    context.arc(px, py, 0.75 * size, 0, 2 * Math.PI);
    context.fill();
  }
}

// Markers of radius 1, by name. Filled or drawn as lines: see MARKS in step.js.
const SHAPES = {
  star: "M0-1.3L.32-.4 1.24-.4 .5.17 .76 1.05 0 .52-.76 1.05-.5.17-1.24-.4-.32-.4z",
  diamond: "M0-1.15L.85 0 0 1.15-.85 0z",
  circle: "M1 0A1 1 0 1 1-1 0A1 1 0 1 1 1 0z",
  square: "M-.85-.85H.85V.85H-.85z",
  up: "M0-1.1L1 .75H-1z",
  down: "M0 1.1L1-.75H-1z",
  asterisk: "M0-1.1V1.1M-.95-.55L.95 .55M-.95 .55L.95-.55",
};

/** A little before the end of the way between two places, so that a marker does not hide the head of an arrow. */
function short_of(from, to, pixels = 10) {
  const length = distance(from, to), share = length > 2 * pixels ? 1 - pixels / length : 1;
  return combine(1 - share, from, share, to);
}

/** A line with a head. */
function arrow_path(from, to, size = 9) {
  const length = distance(from, to) || 1, [u, w] = combine(size / length, to, -size / length, from);
  const barb = (side) => [to[0] - u + 0.5 * side * w, to[1] - w - 0.5 * side * u];
  return `M${from}L${to}M${barb(1)}L${to}L${barb(-1)}`;
}

/** How much two rectangles {x, y, w, h} (centre and size) have in common. */
function overlap(a, b) {
  const w = (a.w + b.w) / 2 - Math.abs(a.x - b.x), h = (a.h + b.h) / 2 - Math.abs(a.y - b.y);
  return w > 0 && h > 0 ? w * h : 0;
}

const AROUND = [[1, 0], [-1, 0], [0, -1], [0, 1], [1, -1], [-1, -1], [1, 1], [-1, 1]];

/**
 * Places for labels beside their points, one after the other, each where it hides least of what is there already.
 * points: [{key, at: [px, py], radius}]; returns them with `label`, the centre. `more` are places to leave free.
 */
function place_labels(points, width, more = []) {
  const taken = [...points, ...more].map(({ at: [x, y], radius = 8 }) => {
    const side = 2 * Math.min(radius, 11); // the dotted ring of a handle may be written over, its marker not
    return { x, y, w: side, h: side };
  });
  return points.map((point) => {
    const { radius = 8, at } = point, h = 20;
    const w = sum(label(point.key), ({ text, lower }) => (lower ? 8 * text.length : text.includes("=") ? 38 : 18));
    let best = null;
    for (const away of [0, 16, 34]) {
      AROUND.forEach(([u, v], i) => {
        const x = at[0] + u * (w / 2 + radius + away), y = at[1] + v * (radius + h / 2 + away) * (u ? 0.8 : 1);
        const rectangle = { x, y, w, h };
        const outside = Math.max(0, w / 2 - x, x + w / 2 - width, h / 2 - y, y + h / 2 - width);
        const misread = points.some((other) => distance(other.at, [x, y]) < distance(at, [x, y])); // as another's
        const cost = sum(taken, (other) => overlap(rectangle, other)) + 60 * outside + 2 * away + i + 300 * misread;
        if (!best || cost < best.cost) best = { ...rectangle, cost };
      });
    }
    taken.push(best);
    return { ...point, label: best };
  });
}

/** Symbols as texts of the SVG, the lower parts smaller. items: what place_labels returns. */
function write_labels(group, items) {
  const texts = place(group, "text", items, ({ key, label: { x, y }, strong }) => ({
    x, y: y + 5, class: `${SYMBOLS[key.split(" = ")[0]].role} ${strong ? "strong" : ""}` }));
  texts.forEach((text, i) => {
    if (text.dataset.key === items[i].key) return;
    text.dataset.key = items[i].key;
    text.replaceChildren(...label(items[i].key).map(({ text: piece, lower }, n, pieces) =>
      make("tspan", { class: lower ? "lower" : null, dy: lower ? 4 : pieces[n - 1]?.lower ? -4 : null }, piece)));
  });
}

const KEY_STEP = 0.05, FINE_KEY_STEP = 0.01; // arrow keys; with shift

/** A point that is dragged, or moved with the arrow keys when it has the focus. move(point) puts it somewhere else. */
function add_handle(v, key, move) {
  const handle = make("g", { class: "handle", tabindex: 0, role: "button", "aria-roledescription": "movable point" },
    make("circle", { r: 17 }));
  let grip = null; // from the pointer to the point
  const pointer = ({ clientX, clientY }) => {
    const { left, top, width } = v.svg.getBoundingClientRect();
    return scale_of(v.now.box, width).from([clientX - left, clientY - top]);
  };
  const inside = (point) => point.map((value, i) => rounded(clamp(value, ...v.now.box[i])));
  handle.onpointerdown = (event) => {
    handle.setPointerCapture(event.pointerId);
    handle.focus({ preventScroll: true });
    grip = combine(1, v.n[key], -1, pointer(event));
    event.preventDefault();
  };
  handle.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false }); // no scrolling
  handle.onpointermove = (event) => { if (grip) move(inside(combine(1, pointer(event), 1, grip))); };
  handle.onpointerup = handle.onpointercancel = () => { grip = null; };
  handle.onkeydown = (event) => {
    const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!direction) return;
    event.preventDefault();
    move(inside(combine(1, v.n[key], event.shiftKey ? FINE_KEY_STEP : KEY_STEP, direction)));
  };
  find(".handles", v.svg).append(handle);
  return handle;
}

/** Put the handle of a quantity where it is, and say so. */
function place_handle(handle, key, point, at) {
  set(handle, {
    display: at ? null : "none",
    transform: at ? `translate(${at})` : null,
    "aria-label": `${key} at ${point.map(shown).join(", ")}; drag it, or move it with the arrow keys`,
  });
}

/** The canvas and the SVG of a plane, inside an element that waits for them. */
function add_plane(element, text, groups) {
  const canvas = make("canvas", { "aria-hidden": "true" });
  const svg = make("svg", { role: "group", "aria-label": text }, ...groups.map((name) => make("g", { class: name })));
  element.append(canvas, svg);
  return { canvas, svg, ...Object.fromEntries(groups.map((name) => [name, find(`.${name}`, svg)])) };
}

const rounded = (value) => Math.round(value * 1e4) / 1e4;
const shown = (value) => (Math.abs(value) < 5e-5 ? 0 : value).toFixed(4);

// ---------------------------------------------------------------------------------------------------------------------
// Noise. The same name gives the same numbers (random.js)
// ---------------------------------------------------------------------------------------------------------------------

/** n points with standard normal coordinates, named by whole numbers. */
function normal_points(n, ...key) {
  const values = random.normal(0, "page", key, 2 * n);
  return range(n).map((i) => [values[2 * i], values[2 * i + 1]]);
}

/** n points x0 ~ q(x0 | c). */
function data_points(q, c, n, ...key) {
  const u = random.uniform(0, "page", [...key, c], n), z = normal_points(n, ...key, c, 1);
  return z.map((point, i) => draw_data(q, c, u[i], point));
}
