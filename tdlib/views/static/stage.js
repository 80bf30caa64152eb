// Shows a view, which the kernel draws as HTML with every string of the data escaped. The mouse or the focus on a
// token of a sheet (a statement and its picture) says its numbers in the line below; what agrees with it in the
// other modality lights up.

const LIGHT = "0, 114, 178";

// `agreement()` is a function of two tokens, or null where nothing is known; 0 for tokens without a target.
function linked(sheet, agreement) {
  const line = sheet.querySelector(".tdlib-line");
  const rest = line.textContent;
  line.setAttribute("aria-live", "polite");
  const at = {};  // the nodes of each token: pieces of words are spans, boxes are divs
  for (const node of sheet.querySelectorAll("[data-token]")) {
    (at[node.dataset.token] ??= []).push(node);
    node.setAttribute("aria-label", node.title);
    node.removeAttribute("title");  // the line says it, at once
  }
  const before = new Map();
  let current = null;
  const clear = () => {
    current = null;
    for (const [node, style] of before) node.setAttribute("style", style);
    before.clear();
    line.textContent = rest;
  };
  const change = (node, style) => {
    if (!before.has(node)) before.set(node, node.getAttribute("style"));
    Object.assign(node.style, style);
  };
  const isBox = (token) => at[token][0].tagName === "DIV";
  const enter = (token) => {
    clear();
    current = token;
    line.textContent = at[token][0].getAttribute("aria-label");
    for (const node of at[token]) change(node, { outline: `2px solid rgb(${LIGHT})` });
    const cosine = agreement();
    const others = cosine && cosine(token, token)
      ? Object.keys(at).filter((other) => isBox(other) !== isBox(token) && cosine(other, other)) : [];
    if (!others.length) return;
    const values = others.map((other) => cosine(token, other));
    const low = Math.min(...values), high = Math.max(...values);
    for (const other of others) {
      const share = high > low ? (cosine(token, other) - low) / (high - low) : 0;
      if (share <= 0.5) continue;
      const strength = 0.1 + 0.8 * (2 * share - 1);
      const style = isBox(other) ? { backgroundColor: `rgba(${LIGHT}, ${strength.toFixed(2)})` }
        : { boxShadow: `inset 0 -0.55em 0 rgba(${LIGHT}, ${(0.7 * strength).toFixed(2)})` };
      for (const node of at[other]) change(node, style);
    }
    line.textContent += `; blue: agrees with it, cosines ${low.toFixed(3)} to ${high.toFixed(3)}`;
  };
  for (const [token, nodes] of Object.entries(at)) {
    for (const node of nodes) {
      if (!isBox(token)) node.tabIndex = 0;
      for (const name of ["mouseenter", "focus"]) node.addEventListener(name, () => enter(token));
      for (const name of ["mouseleave", "blur"]) node.addEventListener(name, clear);
    }
  }
  return () => { if (current !== null) enter(current); };  // when more is known than as the mouse came
}

// A matrix (tokens, tokens) of float32, as the kernel sends it: a function of two tokens; null if it is empty.
function cosines(bytes) {
  if (!bytes?.byteLength) return null;
  const count = Math.sqrt(bytes.byteLength / 4);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return (one, other) => view.getFloat32(4 * (Number(one) * count + Number(other)), true);
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
  let again = [];
  const draw = () => {
    root.innerHTML = model.get("html");
    const sheets = [...root.querySelectorAll(".tdlib-sheet")];
    // the cosines are those of the first sheet's tokens: of another statement's nothing is known
    const same = sheets.filter((sheet) => sheet.dataset.key === sheets[0].dataset.key);
    again = sheets.map((sheet) => linked(
      sheet, () => (same.includes(sheet) ? cosines(model.get("agreement")) : null)));
    performance.mark("tdlib-drawn");
  };
  model.on("change:html", draw);
  model.on("change:agreement", () => again.forEach((enter) => enter()));
  model.on("msg:custom", (message, buffers) => save(message.name, message.kind, buffers[0]));
  draw();
}
export default { render };
