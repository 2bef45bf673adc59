// The last requests and those that run, with their times; no prompts.

import { h, pageHead, table } from "../dom.js";
import { number, seconds, time } from "../format.js";
import { t } from "../i18n.js";
import { every } from "./every.js";

export function requests(main, { api }) {
  const problem = h("div", {});
  const list = h("div", { class: "panel" }, h("p", { class: "muted" }, t("Loading …")));
  main.replaceChildren(pageHead(t("Requests")), problem, list);
  return every(2000, problem, async () => {
    const { data } = await api.get("/admin/api/requests?limit=100");
    list.replaceChildren(data.length === 0 ? h("div", { class: "empty" }, t("No requests yet.")) : table([
      [t("Time"), (row) => time(row.started_at)], [t("Key"), (row) => row.key_name], [t("Model"), (row) => row.model], [t("Endpoint"), (row) => h("code", {}, row.endpoint)],
      [t("Status"), status], [t("Wait"), (row) => seconds(row.queued), "num"], [t("First token"), (row) => seconds(row.first_token), "num"], [t("Duration"), (row) => seconds(row.duration), "num"],
      [t("In"), (row) => number(row.prompt_tokens), "num"], [t("Out"), (row) => number(row.completion_tokens), "num"],
    ], data));
  });
}

function status(row) {
  if (row.ended_at === null) return h("span", { class: "tag warn" }, t("runs"));
  return h("span", { class: `tag ${row.error ? "bad" : "ok"}` }, row.error ? `${row.status} ${row.error}` : row.status);
}
