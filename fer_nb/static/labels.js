// A bar of labels to click, and the keys of the cell that it stands in.
// The kernel's side is `LabelBar` in nbs/06b_browser_parts.ipynb.

function makeButton(k, name, colour) {
  const button = document.createElement("button");
  button.innerHTML = `<kbd>${k}</kbd><span></span>`;
  button.lastChild.textContent = name;
  button.dataset.label = k;
  button.title = k ? `${name} from here on (key ${k})` : "No label from here on (key 0)";
  button.style.setProperty("--colour", colour);
  return button;
}

function typing(at) {  // whether a key goes into a text
  return at.isContentEditable || at.tagName === "TEXTAREA" || (at.tagName === "INPUT" && !["checkbox", "range"].includes(at.type));
}

function render({model, el}) {
  const press = key => model.send({kind: "key", key});
  const names = ["none", ...model.get("names")], colours = ["#5c5c5c", ...model.get("colours")];
  const buttons = names.map((name, k) => makeButton(k, name, colours[k]));
  el.classList.add("fer-labels");
  el.append(...buttons);

  const show = () => buttons.forEach((button, k) => {
    button.setAttribute("aria-pressed", k === model.get("hand"));
    button.classList.toggle("shown", k > 0 && k === model.get("shown"));
  });
  buttons.forEach((button, k) => { button.onclick = () => press(String(k)); });
  model.on("change:hand", show);
  model.on("change:shown", show);
  show();

  const root = () => el.closest(".fer-cell") ?? el;
  const onKey = event => {
    const at = event.target;
    if (!root().contains(at) || typing(at) || event.ctrlKey || event.metaKey || event.altKey || event.key.length !== 1) return;
    event.stopImmediatePropagation();  // no single key of ours means a command of the notebook's
    if (event.key === " " && at.closest("button, input")) return;  // presses that button
    event.preventDefault();
    if (model.get("typed").includes(event.key)) press(event.key);
  };
  window.addEventListener("keydown", onKey, true);
  const soon = setTimeout(() => { root().tabIndex = -1; }, 0);  // a click on the cell gives it the focus
  return () => { window.removeEventListener("keydown", onKey, true); clearTimeout(soon); };
}

export default {render};
