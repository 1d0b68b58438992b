// Formulas: the names of losses.py, as MathML in the text and as labels in the plane.
//
//     typeset(document.body)          // every $x0_hat = x_t - t V$ in the text becomes a formula
//     label("x0_hat")                 // the same symbol in pieces, for an SVG text
//
// A colour says what a symbol is, in the text as in the figures: given (data and noise), the prediction, the judgement
// of it, the target.

const SYMBOLS = {
  x0: { base: "x", sub: "0", role: "given" },
  eps: { base: "ε", role: "given" },
  x_t: { base: "x", sub: "t", role: "given" },
  x0_hat: { base: "x", hat: true, sub: "0", role: "predict" },
  x_s_hat: { base: "x", hat: true, sub: "s", role: "predict" },
  eps_s: { base: "ε", sub: "s", role: "given" },
  x_s: { base: "x", sub: "s", role: "given" },
  G_c: { base: "G", sub: "c", role: "judge" },
  G_null: { base: "G", sub: "∅", role: "judge" },
  G_fake: { base: "G", sub: "fake", role: "judge" },
  Delta: { base: "Δ", role: "judge" },
  x_self: { base: "x", sub: "self", role: "target" },
  lambda: { base: "λ", role: "target" },
  mix: { base: "m", role: "target" },
  x_tar: { base: "x", sub: "tar", role: "target" },
  x_renorm: { base: "x", sub: "renorm", role: "target" },
  loss: { base: "L", role: "target" },
  null: { base: "∅" },
  t_next: { base: "t", sub: "next" },
  s_k: { base: "s", sub: "k" },
  w: { base: "w" },
  origin: { base: "0", role: "given" },
};
const OPERATORS = { "-": "−" };

/** MathML of one token of a formula. */
function token_math(token) {
  if (!(token in SYMBOLS)) {
    if (/^[\d.]+$/.test(token)) return `<mn>${token}</mn>`;
    if (/^[A-Za-z]/.test(token)) return `<mi>${token}</mi>`;
    return `<mo>${(OPERATORS[token] ?? token).replace("<", "&lt;")}</mo>`;
  }
  const { base, hat, sub, role } = SYMBOLS[token];
  const core = hat ? `<mover accent="true"><mi>${base}</mi><mo stretchy="false">^</mo></mover>` : `<mi>${base}</mi>`;
  const whole = sub ? `<msub>${core}${sub.length > 1 ? `<mtext>${sub}</mtext>` : `<mi>${sub}</mi>`}</msub>` : core;
  return `<mrow${role ? ` class="${role}"` : ""}>${whole}</mrow>`;
}

/** A formula in the names of losses.py as MathML. A superscript is one token, as in ||x||^2. */
function formula(text) {
  const parts = [];
  let open = false; // a norm
  for (const [, power, token] of text.matchAll(/\s*(\^?)(<=|\|\||[A-Za-z]\w*|[\d.]+|\S)/g)) {
    if (token === "||") {
      open = !open;
      parts.push(`<mo form="${open ? "prefix" : "postfix"}" stretchy="false">‖</mo>`);
    } else {
      parts.push(power ? `<msup>${parts.pop()}${token_math(token)}</msup>` : token_math(token));
    }
  }
  return `<math>${parts.join("")}</math>`;
}

/** Replace what stands between dollar signs in the texts of an element. */
function typeset(element) {
  const texts = document.createTreeWalker(element, NodeFilter.SHOW_TEXT), found = [];
  while (texts.nextNode()) if (/\$.+\$/s.test(texts.currentNode.data)) found.push(texts.currentNode);
  for (const text of found) {
    const holder = document.createElement("span");
    const escaped = text.data.replace(/&/g, "&amp;").replace(/\$(.+?)\$|</gs, (whole, inside) =>
      inside ? formula(inside) : "&lt;");
    holder.innerHTML = escaped;
    text.replaceWith(...holder.childNodes);
  }
}

/** The pieces of a symbol for an SVG text: [{text, lower}]. "G_c = G_null" are two at one place. */
function label(names) {
  return names.split(" = ").flatMap((name, i) => {
    const { base, hat, sub } = SYMBOLS[name], text = (i ? " = " : "") + base + (hat ? "\u0302" : "");
    return [{ text, lower: false }, ...(sub ? [{ text: sub, lower: true }] : [])];
  });
}
