// What both views of the plane share: the window on it, its colours, the data as contours, labels that give way.

const CONDITIONS = [
  { colour: "blue", dash: [], line: "solid" },
  { colour: "orange", dash: [7, 4], line: "dashed" },
  { colour: "green", dash: [2, 3], line: "dotted" },
];

/** A colour of style.css by name, as the page shows it now (light or dark). */
const colour_of = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** The window: a square that holds the modes, {x: [from, to], y: [from, to]}. */
function frame(q, margin = 0.8) {
  const [x, y] = [0, 1].map((i) => d3.extent(q.m, (m) => m[i]));
  const half = Math.max(x[1] - x[0], y[1] - y[0]) / 2 + margin;
  const around = ([low, high]) => [(low + high) / 2 - half, (low + high) / 2 + half];
  return { x: around(x), y: around(y) };
}

/** From points of the plane to pixels of a square of the given width, and back with .invert. */
function scales(box, width) {
  return { x: d3.scaleLinear(box.x, [0, width]), y: d3.scaleLinear(box.y, [width, 0]) };
}

/** n x n points, evenly spread over the window, row by row. */
function grid_points(box, n) {
  const along = ([low, high]) => d3.range(n).map((i) => low + ((i + 0.5) * (high - low)) / n);
  return along(box.y).flatMap((y) => along(box.x).map((x) => [x, y]));
}

/** The point of the window that is nearest to a point, with four decimals. */
const inside = (box, [x, y]) => [clamp(x, box.x), clamp(y, box.y)].map(rounded);
const clamp = (value, [low, high]) => Math.max(low, Math.min(high, value));

/** A canvas made as sharp as the screen; returns its context, cleared, and its width in CSS pixels. */
function fresh_canvas(canvas) {
  const width = canvas.clientWidth, ratio = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio)) canvas.width = canvas.height = Math.round(width * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, width);
  return { context, width };
}

/** Lines of equal density of q(x0 | c) for each condition, at 2 and 4.5 below the peak of its logarithm. */
function data_contours(q, box, n = 110) {
  const points = grid_points(box, n), [x, y] = [d3.scaleLinear([0, n], box.x), d3.scaleLinear([0, n], box.y)];
  return d3.range(q.C).map((c) => {
    const logs = points.map((point) => log_density(q, point, 0, c)), peak = d3.max(logs);
    const lines = d3.contours().size([n, n]).thresholds([peak - 4.5, peak - 2])(logs);
    const place = ([u, v]) => [x(u), y(v)];
    return lines.map((line) => line.coordinates.flat().map((curve) => curve.map(place)));
  });
}

/** Draw the contours; the chosen condition is filled, the others are lines. chosen = C chooses all. */
function draw_data(context, contours, chosen, { x, y }) {
  contours.forEach((levels, c) => {
    const { colour, dash } = CONDITIONS[c], own = c === chosen || chosen === contours.length;
    context.strokeStyle = context.fillStyle = colour_of(colour);
    context.setLineDash(dash);
    context.lineWidth = own ? 1.6 : 1.1;
    for (const curves of levels) {
      context.beginPath();
      for (const curve of curves) {
        curve.forEach(([u, v], i) => (i ? context.lineTo(x(u), y(v)) : context.moveTo(x(u), y(v))));
        context.closePath();
      }
      context.globalAlpha = own ? 0.16 : 0;
      context.fill();
      context.globalAlpha = own ? 0.9 : 0.65;
      context.stroke();
    }
  });
  context.globalAlpha = 1;
  context.setLineDash([]);
}

/** How much two rectangles {x, y, w, h} (centre and size) have in common. */
function overlap(a, b) {
  const w = (a.w + b.w) / 2 - Math.abs(a.x - b.x), h = (a.h + b.h) / 2 - Math.abs(a.y - b.y);
  return w > 0 && h > 0 ? w * h : 0;
}

/**
 * Places for labels beside their points, one after the other, each where it hides least of what is there already.
 *
 * points: [{key, text, at: [px, py], radius}], width of the square. Returns the points with `label` {x, y, w, h}.
 */
function place_labels(points, width) {
  const taken = points.map(({ at, radius = 8 }) => ({ x: at[0], y: at[1], w: 2 * radius, h: 2 * radius }));
  return points.map((point) => {
    const w = 8 * point.text.length + 4, h = 17, { radius = 8 } = point;
    let best = null;
    for (const away of [0, 16, 34]) {
      for (const [i, [u, v]] of [[1, 0], [-1, 0], [0, -1], [0, 1], [1, -1], [-1, -1], [1, 1], [-1, 1]].entries()) {
        const x = point.at[0] + u * (w / 2 + radius + away), y = point.at[1] + v * (radius + 8 + away) * (u ? 0.8 : 1);
        const label = { x, y, w, h };
        const outside = Math.max(0, w / 2 - x, x + w / 2 - width, h / 2 - y, y + h / 2 - width);
        const cost = d3.sum(taken, (other) => overlap(label, other)) + 60 * outside + 2 * away + i;
        if (!best || cost < best.cost) best = { ...label, cost };
      }
    }
    taken.push(best);
    return { ...point, label: best };
  });
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

/** Redraw when the size of `element` changes, or the page turns from light to dark. */
function redraw_when_needed(element, draw) {
  new ResizeObserver(draw).observe(element);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

/** Uniform numbers in [0, 1), named by anything: the same name gives the same numbers, another name others. */
function random_source(...name) {
  let hash = 2166136261; // FNV-1a, so that names that are nearly alike give numbers that are not
  for (const letter of name.join(" ")) hash = Math.imul(hash ^ letter.charCodeAt(0), 16777619);
  return d3.randomLcg((hash >>> 0) / 2 ** 32);
}

/** n points with standard normal coordinates; four decimals, as the page shows them. */
function normal_points(n, ...name) {
  const normal = d3.randomNormal.source(random_source("normal", ...name))();
  return d3.range(n).map(() => [rounded(normal()), rounded(normal())]);
}

/** n points x0 ~ q(x0 | c). */
function data_points(q, c, n, ...name) {
  const uniform = random_source("data", c, ...name), shares = d3.cumsum(q.table[c]);
  return normal_points(n, "data", c, ...name).map((z) => {
    const k = Math.min(d3.bisectLeft(shares, uniform()), q.m.length - 1);
    return combine(1, q.m[k], Math.sqrt(q.v), z).map(rounded);
  });
}

const rounded = (value) => Math.round(value * 1e4) / 1e4;
const shown = (value) => (Math.abs(value) < 5e-5 ? 0 : value).toFixed(4);
