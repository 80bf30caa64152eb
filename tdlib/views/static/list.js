// A list of examples, one page of rows however many there are. With the focus it moves by arrow keys, j and k,
// page keys, Home and End; it takes keys from nothing else, and JupyterLab's own shortcuts stay away from it.
// Texts of the data reach the page as text nodes only.

function button(label, title, act) {
  const node = document.createElement("button");
  node.textContent = label;
  node.title = title;
  node.addEventListener("click", act);
  return node;
}

function render({ model, el }) {
  const root = document.createElement("div");
  root.className = "tdlib-list";
  root.tabIndex = 0;
  root.setAttribute("role", "listbox");
  root.setAttribute("aria-label", "examples");
  root.setAttribute("data-lm-suppress-shortcuts", "true");
  const bar = document.createElement("div");
  bar.className = "tdlib-bar";
  const rows = document.createElement("div");
  const count = document.createElement("span");
  const jump = document.createElement("input");
  jump.type = "range";
  jump.min = "0";
  jump.title = "jump to an example";
  const move = (position) => {
    const last = model.get("total") - 1;
    const next = Math.max(0, Math.min(last, position));
    if (last < 0 || next === model.get("position")) return;
    performance.mark("tdlib-step");
    model.set("position", next);
    model.save_changes();
  };
  const step = (by) => () => move(model.get("position") + by);
  bar.append(button("\u25c0", "previous example (left, k)", step(-1)),
             button("\u25b6", "next example (right, j)", step(1)), count, jump);
  root.append(bar, rows);
  jump.addEventListener("change", () => move(Number(jump.value)));
  root.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target === jump) return;
    const page = model.get("page"), at = model.get("position");
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, j: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1,
                 k: at - 1, PageDown: at + page, PageUp: at - page, Home: 0,
                 End: model.get("total") - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    move(to);
  });
  const draw = () => {
    const at = model.get("position"), total = model.get("total");
    const number = (value) => value.toLocaleString("en");
    count.textContent = total ? ` ${number(at + 1)} of ${number(total)} ` : " none ";
    jump.max = String(Math.max(0, total - 1));
    jump.value = String(at);
    jump.disabled = total < 2;
    rows.replaceChildren(...model.get("rows").map(([position, text]) => {
      const row = document.createElement("div");
      row.className = "tdlib-row";
      row.setAttribute("role", "option");
      row.setAttribute("aria-selected", String(position === at));
      row.textContent = row.title = text;
      row.addEventListener("click", () => { root.focus(); move(position); });
      return row;
    }));
  };
  for (const name of ["rows", "position", "total"]) model.on(`change:${name}`, draw);
  draw();
  el.append(root);
}
export default { render };
