// Builds elements: h("p", {class: "muted"}, "text", child). `on…` are listeners; false and null children are left out.

const SVG = "http://www.w3.org/2000/svg";

export function h(tag, attributes = {}, ...children) {
  return build(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return build(document.createElementNS(SVG, tag), attributes, children);
}

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled") element[name] = value;
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function field(label, input) {
  return h("label", {}, h("span", {}, label), input);
}

export function check(label, checked, onchange) {
  const box = h("input", { type: "checkbox", checked, onchange: () => onchange(box.checked) });
  return h("label", { class: "check" }, box, h("span", {}, label));
}

export function table(columns, rows) {
  const head = columns.map(([title, , kind]) => h("th", { class: kind ?? false, scope: "col" }, title));
  const body = rows.map((row) => h("tr", {}, columns.map(([, cell, kind]) => h("td", { class: kind ?? false }, cell(row) ?? "–"))));
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": columns.map(([title]) => title).filter(Boolean).join(", ") || "Table" }, h("table", {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, body)));
}

export function pageHead(title, ...actions) {
  return h("header", { class: "page" }, h("h1", {}, title), h("div", { class: "row" }, actions));
}

export function note(text, isBad = false) {
  return h("div", { class: isBad ? "note bad" : "note", role: isBad ? "alert" : "status" }, text);
}

// Asks before something that cannot be taken back; answers whether to go on.
export function confirmed(question, yes, no) {
  return new Promise((resolve) => {
    const box = h("dialog", { "aria-label": question },
      h("p", {}, question),
      h("div", { class: "row end" },
        h("button", { onclick: () => box.close("no") }, no),
        h("button", { class: "primary", onclick: () => box.close("yes") }, yes)));
    box.addEventListener("close", () => { box.remove(); resolve(box.returnValue === "yes"); });
    document.body.append(box);
    box.showModal();
  });
}
