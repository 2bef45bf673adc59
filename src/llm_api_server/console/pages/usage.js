// Usage page: totals and charts, of all keys for administrators, else of the session's key.

import { chart } from "../chart.js";
import { choice, empty, h, loading, note, pageHead, panelHead, table } from "../dom.js";
import { number, seconds } from "../format.js";
import { t } from "../i18n.js";
import { icon } from "../icons.js";

const HOUR = 3600e3;
const SPANS = {
  "24h": { title: "Last 24 hours", step: "hour", count: 24, length: HOUR },
  "7d": { title: "Last 7 days", step: "day", count: 7, length: 24 * HOUR },
  "30d": { title: "Last 30 days", step: "day", count: 30, length: 24 * HOUR },
};

export function usage(main, { api, isAdmin }) {
  const problem = h("div", {});
  const content = h("div", {}, loading(t("Loading …")));
  const span = choice(t("Time"), Object.entries(SPANS).map(([value, { title }]) => [value, t(title)]), { onchange: () => refresh() });
  const model = choice(t("Model"), [["", t("All models")]], { onchange: () => refresh() });
  const key = choice(t("Key"), [["", t("All keys")]], { onchange: () => refresh() });
  const path = isAdmin ? "/admin/api/usage" : "/v1/usage";

  async function refresh() {
    const chosen = SPANS[span.value];
    const times = timesOf(chosen);
    const ask = (groups, filters = {}) => api.get(`${path}?${new URLSearchParams({ since: times[0], group_by: groups, ...filters })}`);
    const filters = Object.fromEntries(Object.entries({ model: model.value, key: key.value }).filter(([, value]) => value));
    try {
      const [over, byModel, byKey, models, keys] = await Promise.all([
        ask(chosen.step, filters), ask("model", filters), isAdmin ? ask("key", filters) : null, ask("model"), isAdmin ? ask("key") : null]);
      problem.replaceChildren();
      offer(model, models.data.map((row) => [row.model, row.model]));
      if (keys) offer(key, keys.data.map((row) => [row.key_id, row.key_name]));
      if (over.total === null) content.replaceChildren(h("div", { class: "panel" }, empty(icon("usage"), t("No usage in this period."), t("Requests appear here shortly after they end."))));
      else content.replaceChildren(stats(over.total), charts(over.data, chosen, times), sums(t("By model"), t("Model"), byModel.data, (row) => row.model), ...(byKey ? [sums(t("By key"), t("Key"), byKey.data, (row) => row.key_name)] : []));
    } catch (error) { problem.replaceChildren(note(error.message, true)); }
  }

  main.replaceChildren(pageHead(t("Usage"), h("div", { class: "toolbar" }, model, isAdmin ? key : null, span)), problem, content);
  refresh();
}

// Replace the options; the selected one stays.
function offer(select, options) {
  const before = select.value;
  select.replaceChildren(select.options[0], ...options.map(([value, title]) => h("option", { value }, title)));
  select.value = options.some(([value]) => value === before) ? before : "";
}

// Start times (UTC) of the hours or days, as the API writes them; the last one is not over.
function timesOf({ step, count, length }) {
  const last = Math.floor(Date.now() / length) * length;
  const all = Array.from({ length: count }, (_, i) => new Date(last - (count - 1 - i) * length).toISOString());
  return all.map((one) => (step === "day" ? one.slice(0, 10) : one.replace(".000Z", "Z")));
}

function shown(at, step) {
  const options = step === "hour" ? { hour: "2-digit", minute: "2-digit", hour12: false } : { month: "short", day: "numeric", timeZone: "UTC" };
  return new Date(at).toLocaleString(document.documentElement.lang, options);
}

function stats(total) {
  const one = (title, value) => h("div", {}, h("span", { class: "muted small" }, t(title)), h("b", {}, value));
  return h("section", { class: "panel stats", "aria-label": t("Totals") },
    one("Requests", number(total.requests)), one("Input tokens", number(total.prompt_tokens)), one("Output tokens", number(total.completion_tokens)),
    one("Errors", number(total.errors)), one("Mean time to first token", seconds(total.first_token)), one("Mean duration", seconds(total.requests ? total.seconds / total.requests : null)));
}

function charts(rows, { step }, times) {
  const byTime = new Map(rows.map((row) => [row[step], row]));
  const values = (read) => times.map((at) => { const row = byTime.get(at); return row ? read(row) : 0; });
  const means = (read) => times.map((at) => { const row = byTime.get(at); return row ? read(row) : null; });
  const names = times.map((at) => shown(at, step));
  const busiest = (list) => names[list.indexOf(Math.max(...list))];
  const draw = (title, series, options = {}) => chart({ title: t(title), times: names, series: series.map(([name, kind, list]) => ({ title: t(name), kind, values: list })), ...options });
  const tokens = values((row) => row.prompt_tokens + row.completion_tokens);
  const requests = values((row) => row.requests);
  const errors = values((row) => row.errors);
  const total = (list) => number(list.reduce((all, one) => all + one, 0));
  const whole = means((row) => (row.requests ? row.seconds / row.requests : null));
  const slowest = Math.max(...whole.map((one) => one ?? 0));
  return h("div", { class: "charts" },
    draw("Tokens", [["Input", "fill-0", values((row) => row.prompt_tokens)], ["Output", "fill-1", values((row) => row.completion_tokens)]], { summary: `${total(tokens)}, ${t("peak at")} ${busiest(tokens)}` }),
    draw("Requests", [["Requests", "fill-0", requests]], { summary: `${total(requests)}, ${t("peak at")} ${busiest(requests)}` }),
    draw("Mean latency", [["First token", "fill-0", means((row) => row.first_token)], ["Full response", "fill-2", whole]], { isLines: true, show: seconds, summary: `${t("longest")} ${seconds(slowest)}, ${names[whole.indexOf(slowest)] ?? ""}` }),
    draw("Errors", [["Errors", "fill-bad", errors], ["Client disconnected", "fill-other", values((row) => row.aborted)]], { summary: `${total(errors)}, ${t("peak at")} ${busiest(errors)}` }));
}

function sums(title, first, rows, name) {
  return h("section", { class: "panel flush" }, panelHead(title), h("div", {}, table(title, [
    [first, name, "strong"], [t("Requests"), (row) => number(row.requests), "num"], [t("Input tokens"), (row) => number(row.prompt_tokens), "num"], [t("Output tokens"), (row) => number(row.completion_tokens), "num"],
    [t("Errors"), (row) => number(row.errors), "num"], [t("First token"), (row) => seconds(row.first_token), "num"], [t("Mean duration"), (row) => seconds(row.requests ? row.seconds / row.requests : null), "num"],
  ], rows)));
}
