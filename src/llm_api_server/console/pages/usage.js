// What was used, summed up and drawn: everybody's for administrators, else one's own.

import { h, note, pageHead, svg, table } from "../dom.js";
import { number, seconds } from "../format.js";
import { t } from "../i18n.js";

const SPANS = [["24h", "Last 24 hours", "hour"], ["7d", "Last 7 days", "day"], ["30d", "Last 30 days", "day"]];

export function usage(main, { api, isAdmin }) {
  const problem = h("div", {});
  const span = h("select", { "aria-label": t("Time"), onchange: () => refresh() }, SPANS.map(([value, title]) => h("option", { value }, t(title))));
  const content = h("div", {});
  const path = isAdmin ? "/admin/api/usage" : "/v1/usage";

  async function refresh() {
    const [since, , step] = SPANS.find(([value]) => value === span.value);
    const query = (by) => api.get(`${path}?since=${since}&group_by=${by}`);
    try {
      const [over, byModel, byKey] = await Promise.all([query(step), query("model"), isAdmin ? query("key") : null]);
      problem.replaceChildren();
      content.replaceChildren(...(over.total === null ? [h("div", { class: "panel empty" }, t("Nothing was used in this time."))] : [
        h("div", { class: "panel stats" }, stat("Requests", over.total.requests), stat("Tokens", over.total.prompt_tokens + over.total.completion_tokens), stat("In", over.total.prompt_tokens), stat("Out", over.total.completion_tokens), stat("Errors", over.total.errors)),
        drawing(step === "hour" ? t("Tokens by hour") : t("Tokens by day"), over.data, step),
        sums(t("By model"), t("Model"), byModel.data, (row) => row.model),
        byKey ? sums(t("By key"), t("Key"), byKey.data, (row) => row.key_name) : null,
      ].filter(Boolean)));
    } catch (error) { problem.replaceChildren(note(error.message, true)); }
  }

  main.replaceChildren(pageHead(t("Usage"), span), problem, content);
  refresh();
}

function stat(title, value) {
  return h("div", {}, h("span", { class: "muted small" }, t(title)), h("b", {}, number(value)));
}

function drawing(title, rows, step) {
  const sorted = rows.toSorted((a, b) => (a[step] < b[step] ? -1 : 1));
  const tokens = sorted.map((row) => row.prompt_tokens + row.completion_tokens);
  const most = Math.max(...tokens, 1);
  const width = 100 / Math.max(sorted.length, 12);
  const bars = sorted.map((row, i) => svg("rect", { x: i * width + width * 0.1, width: width * 0.8, y: 100 - (98 * tokens[i]) / most, height: (98 * tokens[i]) / most },
    svg("title", {}, `${row[step]}: ${number(tokens[i])} ${t("Tokens")}, ${number(row.requests)} ${t("Requests")}`)));
  return h("div", { class: "panel" }, h("h2", {}, title),
    svg("svg", { class: "bars", viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img", "aria-label": title }, bars),
    h("div", { class: "row muted small" }, h("span", {}, sorted[0]?.[step] ?? ""), h("span", { class: "grow" }), h("span", {}, sorted.at(-1)?.[step] ?? "")));
}

function sums(title, first, rows, name) {
  return h("div", { class: "panel" }, h("h2", {}, title), table([
    [first, name], [t("Requests"), (row) => number(row.requests), "num"], [t("In"), (row) => number(row.prompt_tokens), "num"], [t("Out"), (row) => number(row.completion_tokens), "num"],
    [t("Errors"), (row) => number(row.errors), "num"], [t("Mean time"), (row) => seconds(row.requests ? row.seconds / row.requests : null), "num"],
  ], rows));
}
