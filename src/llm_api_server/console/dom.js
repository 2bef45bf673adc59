// Builders of elements: h("p", {class: "muted"}, "text", child). `on…` attributes are listeners; null and false children
// are left out.

const SVG = "http://www.w3.org/2000/svg";
const PROPERTIES = new Set(["value", "checked", "disabled"]);

export function h(tag, attributes = {}, ...children) {
  return build(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return build(document.createElementNS(SVG, tag), attributes, children);
}

function build(element, attributes, children) {
  element.append(...present(children));
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (PROPERTIES.has(name)) element[name] = value;
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  return element;
}

function present(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
}

export function fill(element, ...children) {
  element.replaceChildren(...present(children));
}

// Label, input and hint; a screen reader reads the hint after the label.
export function field(label, input, hint) {
  const named = h("label", {}, h("span", {}, label), input);
  if (!hint) return named;
  const id = `hint-${input.name}`;
  input.setAttribute("aria-describedby", id);
  return h("div", {}, named, h("p", { class: "hint", id }, hint));
}

export function check(label, checked, onchange = () => {}) {
  const box = h("input", { type: "checkbox", checked, onchange: () => onchange(box.checked) });
  return h("label", { class: "check" }, box, h("span", {}, label));
}

export function choice(label, options, attributes = {}) {
  return h("select", { "aria-label": label, ...attributes }, options.map(([value, title]) => h("option", { value }, title)));
}

// `columns`: [title, function from row to cell, class]. Narrow screens show a row as a card without its empty cells.
export function table(label, columns, rows) {
  const head = columns.map(([title, , kind]) => h("th", { class: kind, scope: "col" }, title || h("span", { class: "hidden-text" }, label)));
  const body = rows.map((row) => h("tr", {}, columns.map(([title, cell, kind = ""]) => {
    const content = cell(row);
    const isBlank = content === null || content === undefined || content === "" || content === "–";
    return h("td", { class: isBlank ? `${kind} blank muted` : kind, "data-label": title }, isBlank ? "–" : content);
  })));
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label },
    h("table", { class: "cards" }, h("thead", {}, h("tr", {}, head)), h("tbody", {}, body)));
}

// Definition list of [[name, value]]; pairs without a value are left out.
export function facts(pairs) {
  const shown = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "" && value !== "–");
  return h("dl", { class: "facts" }, shown.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

export function pageHead(title, ...actions) {
  return h("header", { class: "page" }, h("h1", {}, title), h("div", { class: "row" }, actions));
}

export function panelHead(title, ...actions) {
  return h("header", {}, h("h2", {}, title), h("div", { class: "row" }, actions));
}

export function note(text, isBad = false) {
  return h("div", { class: isBad ? "note bad" : "note", role: isBad ? "alert" : "status" }, text);
}

export function empty(picture, title, text) {
  return h("div", { class: "empty" }, picture, h("h2", {}, title), text ? h("p", {}, text) : null);
}

export function loading(text) {
  return h("div", { class: "empty", role: "status" }, h("span", { class: "spinner" }), h("p", {}, text));
}

// Show a dialog with the children `content(close)`; resolve to the argument of `close`, and remove the dialog.
export function dialog(label, content, kind = "") {
  return new Promise((resolve) => {
    let result;
    const box = h("dialog", { "aria-label": label, class: kind });
    const close = (value) => { result = value; box.close(); };
    fill(box, content(close));
    box.addEventListener("close", () => { box.remove(); resolve(result); });
    document.body.append(box);
    box.showModal();
  });
}

// Ask for confirmation; resolve to true if it is given. `more` is shown below the question.
export async function confirmed(question, yes, no, { isBad = false, more = null } = {}) {
  return (await dialog(question, (close) => [
    h("p", { class: "wrap" }, question), more,
    h("footer", {}, h("button", { onclick: () => close(false) }, no),
      h("button", { class: isBad ? "primary bad" : "primary", onclick: () => close(true) }, yes)),
  ], "narrow")) === true;
}
