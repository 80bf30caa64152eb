// Draws sheets (a statement and its picture with a value for every token) from the numbers that the kernel sends.
// Nothing is drawn on the server. The mouse or the focus on a token says its numbers in a line below; a word
// lights up the boxes that agree with it, and a box the words. Texts of the data are text nodes only.

const SVG = "http://www.w3.org/2000/svg";
const FRAME = "#c24e00", INK = "#1b1b1b", GREY = "#6b6b6b", LIGHT = "0, 114, 178";

function make(tag, style = {}, text = null) {
  const node = document.createElement(tag);
  Object.assign(node.style, style);
  if (text !== null) node.textContent = text;
  return node;
}

function shape(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  return node;
}

// The words, one span per token; `at` collects the nodes of each token. Blocks beside each other have no direction
// of their own, unlike letters: without `dir` the words of a right-to-left text, and the pieces of each word,
// would stand in the opposite order.
function statement(sheet, at) {
  const root = make("div", { fontSize: "16px", lineHeight: "1.35" });
  root.dir = sheet.direction;
  for (const pieces of sheet.words) {
    const word = make("span", { display: "inline-block", whiteSpace: "nowrap", verticalAlign: "top",
                                margin: "0 2px 4px 0" });
    if (sheet.direction) word.dir = "auto";
    for (const [text, token, objects] of pieces) {
      const own = token === null ? null : sheet.tokens[token];
      const [ground, ink] = own && own.tint.length ? own.tint : ["#ffffff", INK];
      const column = make("span", { display: "inline-block", textAlign: "center", verticalAlign: "top" });
      const letters = make("span", {
        backgroundColor: ground, backgroundClip: "padding-box", padding: "0 1px",
        color: own && (own.tint.length || own.distilled) ? ink : GREY,
        borderTop: `2px dotted ${own && own.truth ? INK : "#ffffff"}`,
        borderBottom: `3px ${own && own.dotted ? "dotted" : "solid"} ${own && own.marked ? INK : "#ffffff"}`,
        fontWeight: own && own.marked ? "bold" : "normal",
      }, text);
      column.append(letters);
      for (const number of objects) column.append(make("small", { color: GREY }, `[${number}]`));
      column.append(document.createElement("br"),
        make("span", { fontSize: "11px", padding: "0 2px", color: INK }, (own && own.value) || "\u00a0"));
      if (token !== null) {
        letters.dataset.token = String(token);
        letters.tabIndex = 0;
        letters.setAttribute("aria-label", `${own.name}: ${own.note}`);
        (at[token] ??= []).push(letters);
      } else {
        letters.title = "not a token of the student";
      }
      word.append(column);
    }
    root.append(word, " ");
  }
  return root;
}

function rectangle(box, attributes) {
  const [left, top, right, bottom] = box;
  return shape("rect", { x: 100 * left, y: 100 * top, width: 100 * (right - left),
                         height: 100 * (bottom - top), fill: "none",
                         "vector-effect": "non-scaling-stroke", ...attributes });
}

// The picture as it is, boxes over it in one SVG that stretches with it, and numbers as HTML over both.
function picture(sheet, source, missing, at) {
  const root = make("div");
  const frame = make("div", { position: "relative", lineHeight: "1" });
  if (source) {
    const image = make("img", { width: "100%", display: "block" });
    image.src = source;
    image.alt = sheet.described;
    frame.append(image);
  } else {
    frame.append(make("div", { backgroundColor: "#eeeeee", paddingBottom: "75%" }));
  }
  const svg = shape("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none" });
  Object.assign(svg.style, { position: "absolute", left: "0", top: "0", width: "100%", height: "100%" });
  for (const [token, ...box] of sheet.boxes) {
    const own = sheet.tokens[token];
    const region = rectangle(box, { fill: own.fill || "transparent" });
    if (own.marked) {
      region.setAttribute("stroke", INK);
      if (own.dotted) region.setAttribute("stroke-dasharray", "2 2");
    }
    region.dataset.token = String(token);
    region.setAttribute("aria-label", `${own.name}: ${own.note}`);
    (at[token] ??= []).push(region);
    svg.append(region);
  }
  const still = { "pointer-events": "none" };
  for (const [, ...box] of sheet.objects) svg.append(rectangle(box, { stroke: FRAME, "stroke-width": 2, ...still }));
  for (const box of sheet.truths) {
    svg.append(rectangle(box, { stroke: "#ffffff", "stroke-width": 3, ...still }),
               rectangle(box, { stroke: INK, "stroke-width": 2, "stroke-dasharray": "5 3", ...still }));
  }
  frame.append(svg);
  const label = (x, y, text, style) => {
    const around = make("div", { position: "absolute", left: `${100 * x - 6}%`, top: `${100 * y - 2.6}%`,
                                 width: "12%", textAlign: "center", fontSize: "10px", pointerEvents: "none" });
    around.append(make("span", { padding: "0 1px", ...style }, text));
    frame.append(around);
  };
  for (const [number, x, y] of sheet.places.objects)
    label(x, y, String(number), { backgroundColor: FRAME, color: "#ffffff" });
  for (const [token, x, y] of sheet.places.numbers)
    label(x, y, sheet.tokens[token].value, { backgroundColor: "#ffffff", color: INK });
  root.append(frame);
  if (missing) root.append(make("div", { fontSize: "12px", color: FRAME }, missing));
  const names = sheet.objects.map(([name], number) => `[${number}] ${name}`).join(", ");
  if (names) root.append(make("div", { fontSize: "12px" }, names));
  return root;
}

function legend(scale) {
  const root = make("div", { fontSize: "12px", lineHeight: "1.8", borderTop: "1px solid #cccccc" });
  for (const [number, ground, ink] of scale.steps)
    root.append(make("span", { backgroundColor: ground, color: ink, padding: "1px 5px" }, number));
  root.append(` ${scale.name}`);
  return root;
}

// What lies under the mouse: every number of it, and what agrees with it in the other modality.
function linked(sheet, at, line, agreement) {
  const before = new Map();
  let current = null;
  const clear = () => {
    current = null;
    for (const [node, style] of before) node.setAttribute("style", style);
    before.clear();
    line.textContent = line.dataset.rest;
  };
  const shade = (node, share) => {
    before.set(node, node.getAttribute("style") ?? "");
    const strength = (0.1 + 0.8 * share).toFixed(2);
    if (node.namespaceURI === SVG) {
      node.style.fill = `rgba(${LIGHT}, ${strength})`;
    } else {
      node.style.boxShadow = `inset 0 -0.55em 0 rgba(${LIGHT}, ${(0.7 * strength).toFixed(2)})`;
    }
  };
  const enter = (token) => {
    clear();
    current = token;
    const own = sheet.tokens[token];
    line.textContent = `${own.name}: ${own.note}`;
    for (const node of at[token]) {
      before.set(node, node.getAttribute("style") ?? "");
      node.style.outline = `2px solid rgb(${LIGHT})`;
      if (node.namespaceURI === SVG) Object.assign(node.style, { stroke: `rgb(${LIGHT})`, strokeWidth: 3 });
    }
    const cosine = agreement(sheet.tokens.length);
    if (!cosine) return;
    const visual = new Set(sheet.boxes.map(([region]) => region));
    const others = Object.keys(at).map(Number).filter((other) => visual.has(other) !== visual.has(token));
    const targets = others.filter((other) => sheet.tokens[other].distilled);
    if (!targets.length || !own.distilled) return;
    const values = targets.map((other) => cosine(token, other));
    const low = Math.min(...values), high = Math.max(...values);
    for (const other of targets) {
      const share = high > low ? (cosine(token, other) - low) / (high - low) : 0;
      if (share > 0.5) for (const node of at[other]) shade(node, 2 * share - 1);
    }
    line.textContent += `; blue: agrees with it, cosines ${low.toFixed(3)} to ${high.toFixed(3)}`;
  };
  for (const [token, nodes] of Object.entries(at)) {
    for (const node of nodes) {
      node.addEventListener("mouseenter", () => enter(Number(token)));
      node.addEventListener("mouseleave", clear);
      node.addEventListener("focus", () => enter(Number(token)));
      node.addEventListener("blur", clear);
    }
  }
  return () => { if (current !== null) enter(current); };  // when more is known than as the mouse came
}

// A matrix (tokens, tokens) of float32, as the kernel sends it: a function of two tokens.
function cosines(bytes, count) {
  if (!bytes) return null;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (view.byteLength !== 4 * count * count) return null;
  return (one, other) => view.getFloat32(4 * (one * count + other), true);
}

function save(name, kind, bytes) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes], { type: kind }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function render({ model, el }) {
  const root = document.createElement("div");
  root.className = "tdlib-stage";
  el.append(root);
  let address = {}, again = [];
  const source = (name) => {
    if (!name) return "";
    const bytes = model.get("pictures")[name];
    if (!address[name] && bytes) address[name] = URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" }));
    return address[name] ?? "";
  };
  const draw = () => {
    const scene = model.get("scene");
    root.replaceChildren();
    again = [];
    if (!scene.sheets) return;
    const head = make("div", { marginBottom: "6px" });
    head.append(make("b", {}, scene.heading), make("span", { color: GREY }, ` ${scene.note}`));
    root.append(head);
    for (const sheet of scene.sheets) {
      const row = make("div");
      row.className = "tdlib-sheet";
      const at = {};
      const about = make("div");
      about.className = "tdlib-about";
      const [first, ...more] = [sheet.name, ...sheet.about].filter(Boolean);
      about.append(make("b", {}, first ?? ""));
      for (const text of more) about.append(make("div", { color: GREY }, text));
      row.append(about);
      if (scene.picture && sheet.boxes.length) {
        const holder = picture(sheet, source(sheet.picture), sheet.missing, at);
        holder.className = "tdlib-picture";
        row.append(holder);
      }
      const words = make("div");
      words.className = "tdlib-words";
      if (scene.words) words.append(statement(sheet, at));
      const line = make("div", { color: GREY, fontSize: "12px", minHeight: "3.2em", marginTop: "4px" }, sheet.below);
      line.className = "tdlib-line";
      line.dataset.rest = sheet.below;
      line.setAttribute("aria-live", "polite");
      words.append(line);
      row.append(words);
      root.append(row);
      again.push(linked(sheet, at, line, (count) => cosines(model.get("agreement")[sheet.key], count)));
    }
    for (const scale of scene.scales) root.append(legend(scale));
    root.append(make("div", { fontSize: "12px", color: GREY }, scene.marks));
    performance.mark("tdlib-drawn");
  };
  model.on("change:scene", draw);
  model.on("change:agreement", () => again.forEach((enter) => enter()));
  model.on("msg:custom", (message, buffers) => save(message.name, message.kind, buffers[0]));
  model.on("change:pictures", () => {
    for (const [name, url] of Object.entries(address)) {
      if (!(name in model.get("pictures"))) { URL.revokeObjectURL(url); delete address[name]; }
    }
  });
  draw();
  return () => { for (const url of Object.values(address)) URL.revokeObjectURL(url); };
}
export default { render };
