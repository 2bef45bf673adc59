// Requests page: requests in flight with their states, and the latest that ended with their times. No prompts.

import { check, empty, fill, h, loading, pageHead, panelHead, svg, table } from "../dom.js";
import { clock, number, seconds } from "../format.js";
import { t } from "../i18n.js";
import { icon } from "../icons.js";
import { every } from "./every.js";

const STEP = 50;
// States of the API, with their label and color.
const STATES = { waiting: ["waiting", "warn"], reading: ["prefill", "accent"], answering: ["generating", "ok"] };

export function requests(main, { api }) {
  const problem = h("div", {});
  const live = h("section", { class: "panel flush" }, loading(t("Loading …")));
  const recent = h("div", {}, loading(t("Loading …")));
  const search = h("input", { type: "search", placeholder: t("Key, model, endpoint or status"), "aria-label": t("Filter") });
  let onlyErrors = false;
  let count = STEP;
  let rows = [];
  const more = h("button", { onclick: () => { count += STEP; refresh(); } }, t("Show more"));
  const draw = () => {
    const wanted = search.value.trim().toLowerCase();
    const shown = rows.filter((row) => row.ended_at !== null && (!onlyErrors || row.error) && words(row).includes(wanted));
    more.hidden = rows.length < count;
    fill(recent, shown.length > 0 ? recentTable(shown) : empty(icon("requests"), rows.length === 0 ? t("No requests yet.") : t("No matching requests."), rows.length === 0 ? t("Requests of clients appear here.") : null));
  };
  async function refresh() {
    const [{ data: running, total }, { data }] = await Promise.all([api.get("/admin/api/requests/live"), api.get(`/admin/api/requests?limit=${count}`)]);
    fill(live, panelHead(t("In flight"), h("span", { class: "muted" }, counts(running, total))), running.length === 0 ? h("div", { class: "empty" }, h("p", {}, t("No requests in flight."))) : h("div", {}, liveTable(running)));
    if (JSON.stringify(data) !== JSON.stringify(rows)) { rows = data; draw(); }
  }
  search.addEventListener("input", draw);
  main.replaceChildren(pageHead(t("Requests"), h("span", { class: "muted small" }, t("Prompts are not shown."))), problem, live,
    h("section", { class: "panel flush" }, panelHead(t("Recent"), h("div", { class: "toolbar" }, search, check(t("Errors only"), false, (on) => { onlyErrors = on; draw(); }))), recent,
      h("div", { class: "row end" }, more)));
  more.hidden = true;
  let isFirst = true;
  return every(1000, problem, async () => { await refresh(); if (isFirst) { isFirst = false; draw(); } });
}

function words(row) {
  return [row.key_name, row.model, row.endpoint, row.status, row.error].join(" ").toLowerCase();
}

function counts(running, total) {
  const parts = Object.entries(STATES).map(([state, [label]]) => [running.filter((one) => one.state === state).length, t(label)]).filter(([count]) => count > 0);
  return [...parts.map(([count, label]) => `${count} ${label}`), total > running.length ? `${total} ${t("in total")}` : ""].filter(Boolean).join(" · ");
}

function liveTable(rows) {
  const now = Date.now() / 1000;
  const rate = (row) => {
    const took = row.first_token === null ? 0 : now - row.started_at - row.first_token;
    return took > 0.5 && row.completion_tokens > 1 ? (row.completion_tokens / took).toFixed(1) : null;
  };
  return table(t("In flight"), [
    [t("Key"), (row) => row.key_name, "strong"], [t("Model"), (row) => row.model], [t("Endpoint"), (row) => h("code", {}, row.endpoint)],
    [t("State"), state],
    [t("Elapsed"), (row) => seconds(Math.max(0, now - row.started_at)), "num"], [t("Queue time"), (row) => seconds(row.queued), "num"], [t("First token"), (row) => seconds(row.first_token), "num"],
    [t("Input"), (row) => number(row.prompt_tokens || null), "num"], [t("Output"), (row) => number(row.completion_tokens || null), "num"], [t("tokens/s"), rate, "num"],
  ], rows);
}

function state(row) {
  const [label, kind] = STATES[row.state];
  return h("span", { class: `tag dot ${kind}` }, row.position ? `${t(label)} · ${t("position")} ${row.position}` : t(label));
}

function recentTable(rows) {
  const longest = Math.max(...rows.map((row) => row.duration ?? 0), 0.001);
  return table(t("Recent"), [
    [t("Time"), (row) => h("span", { class: "nowrap" }, clock(row.started_at))], [t("Key"), (row) => row.key_name], [t("Model"), (row) => h("div", {}, row.model, h("div", { class: "muted small" }, h("code", {}, row.endpoint)))],
    [t("Status"), status], [t("Queue time"), (row) => seconds(row.queued), "num"], [t("First token"), (row) => seconds(row.first_token), "num"], [t("Duration"), (row) => h("div", {}, seconds(row.duration), span(row, longest)), "num"],
    [t("Input"), (row) => number(row.prompt_tokens), "num"], [t("Output"), (row) => number(row.completion_tokens), "num"],
  ], rows);
}

// Duration as a bar relative to the longest one: queue, until the first token, rest.
function span(row, longest) {
  const end = row.duration ?? 0;
  const queued = Math.min(row.queued ?? end, end);
  const first = Math.max(queued, Math.min(row.first_token ?? end, end));
  const parts = [[0, queued, "fill-other"], [queued, first, "fill-0"], [first, end, "fill-1"]];
  return svg("svg", { class: "span", viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": `${t("Queue time")} ${seconds(row.queued)}, ${t("First token")} ${seconds(row.first_token)}, ${t("Duration")} ${seconds(row.duration)}` },
    parts.map(([from, to, kind]) => svg("rect", { class: kind, x: (100 * from) / longest, y: 0, width: (100 * (to - from)) / longest, height: 10 })));
}

function status(row) {
  if (row.error === "client_closed_request") return h("span", { class: "tag warn" }, t("Client disconnected"));
  return h("span", { class: `tag ${row.error ? "bad" : "ok"}` }, row.error ? `${row.status || ""} ${row.error}`.trim() : row.status);
}
