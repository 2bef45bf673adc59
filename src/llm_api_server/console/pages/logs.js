// Logs page: the last lines of gateway, manager and each engine, with search, follow and pause.

import { nameInPath } from "../api.js";
import { choice, empty, fill, h, note, pageHead } from "../dom.js";
import { number } from "../format.js";
import { t } from "../i18n.js";
import { icon } from "../icons.js";
import { every } from "./every.js";

const LEVELS = { debug: 0, info: 1, warning: 2, error: 3 };
const WORDS = [["error", /\b(ERROR|CRITICAL|FATAL|Traceback)\b|\berror:/], ["warning", /\b(WARNING|WARN)\b|\bwarning:/], ["debug", /\b(DEBUG|TRACE)\b/]];

export function logs(main, { api }) {
  const problem = h("div", {});
  const log = choice(t("Log"), [], { onchange: () => { text = null; refresh(); } });
  const level = choice(t("Level"), [["0", t("All levels")], ["1", t("Info and above")], ["2", t("Warnings and errors")], ["3", t("Errors only")]], { onchange: () => draw() });
  const lines = choice(t("Lines"), [["300", `300 ${t("lines")}`], ["1000", `1,000 ${t("lines")}`], ["5000", `5,000 ${t("lines")}`]], { onchange: () => { text = null; refresh(); } });
  const search = h("input", { type: "search", placeholder: t("Search"), "aria-label": t("Search"), oninput: () => draw() });
  const count = h("span", { class: "muted small", role: "status" });
  const follow = h("button", { onclick: () => { follows = !follows; name(); if (follows) refresh(); } });
  const box = h("div", { class: "log", tabindex: 0, role: "region", "aria-label": t("Log") });
  let follows = true;
  let text = null;
  let stop = () => {};

  function name() {
    fill(follow, icon(follows ? "pause" : "play"), follows ? t("Pause") : t("Follow"));
    follow.setAttribute("aria-pressed", String(!follows));
  }

  async function refresh() {
    if (!log.value) return;
    const found = await api.text(`/admin/api/logs/${nameInPath(log.value)}?lines=${lines.value}`);
    if (found === text) return;
    text = found;
    draw();
  }

  function draw() {
    const all = (text ?? "").split("\n").filter(Boolean);
    const wanted = search.value.toLowerCase();
    const shown = withLevels(all).filter(([line, kind]) => LEVELS[kind] >= Number(level.value) && line.toLowerCase().includes(wanted));
    count.textContent = shown.length === all.length ? `${number(all.length)} ${t("lines")}` : `${number(shown.length)} / ${number(all.length)} ${t("lines")}`;
    if (shown.length === 0) fill(box, empty(icon("logs"), all.length === 0 ? t("This log is empty.") : t("No matching lines.")));
    else fill(box, shown.map(([line, kind]) => h("div", { class: kind }, wanted ? marked(line, wanted) : line)));
    if (follows) box.scrollTop = box.scrollHeight;
  }

  name();
  main.replaceChildren(pageHead(t("Logs"), count), problem, h("div", { class: "panel toolbar" }, log, level, lines, search, follow), box);
  api.get("/admin/api/logs").then(({ data }) => {
    fill(log, data.map((one) => h("option", { value: one.name }, one.name)));
    stop = every(2000, problem, () => (follows ? refresh() : undefined));
  }, (error) => problem.replaceChildren(note(error.message, true)));
  return () => stop();
}

// An indented line continues the one before it, and has its level.
function withLevels(lines) {
  let last = "info";
  return lines.map((line) => {
    if (!/^\s/.test(line)) last = WORDS.find(([, word]) => word.test(line))?.[0] ?? "info";
    return [line, last];
  });
}

function marked(line, wanted) {
  const parts = [];
  let rest = line;
  for (let at = rest.toLowerCase().indexOf(wanted); at !== -1; at = rest.toLowerCase().indexOf(wanted)) {
    parts.push(rest.slice(0, at), h("mark", {}, rest.slice(at, at + wanted.length)));
    rest = rest.slice(at + wanted.length);
  }
  return [...parts, rest];
}
