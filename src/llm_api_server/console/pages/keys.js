// Keys page: create, change, rotate and revoke keys. A new secret is shown once.

import { confirmed, dialog, empty, fill, h, loading, note, pageHead, table } from "../dom.js";
import { clock, day, short, time } from "../format.js";
import { t } from "../i18n.js";
import { icon } from "../icons.js";
import { askForKey } from "./key_form.js";

const SHORT_LIMITS = { requests_per_minute: "req/min", tokens_per_minute: "tok/min", tokens_per_day: "tok/day", tokens_per_month: "tok/month", max_concurrent: "concurrent" };
const KINDS = { active: "ok", disabled: "warn", expired: "warn", revoked: "bad" };

export function keys(main, { api }) {
  const problem = h("div", {});
  const secret = h("div", {});
  const list = h("section", { class: "panel flush" }, loading(t("Loading …")));

  async function refresh() {
    const { data } = await api.get("/admin/api/keys");
    fill(list, data.length === 0 ? empty(icon("keys"), t("No keys yet"), t("Create one for each client.")) : table(t("Keys"), [
      [t("Name"), (key) => h("div", { class: "named" }, h("span", { class: "strong" }, key.name), key.note ? h("div", { class: "muted small wrap" }, key.note) : null)],
      [t("State"), (key) => h("span", { class: `tag dot ${KINDS[key.state]}` }, t(key.state))],
      [t("Permissions"), (key) => key.permissions.join(", ")],
      [t("Models"), (key) => (key.models.length === 1 && key.models[0] === "*" ? t("all") : key.models.join(", "))],
      [t("Limits"), limits],
      [t("Expires"), (key) => key.expires_at && h("span", { class: "nowrap", title: time(key.expires_at) }, day(key.expires_at))],
      [t("Last used"), (key) => key.last_used_at && h("span", { class: "nowrap" }, clock(key.last_used_at))],
      ["", (key) => (key.source === "store" ? actions(key) : h("span", { class: "muted small" }, t("in the configuration"))), "actions"],
    ], data));
  }

  const attempt = async (work) => {
    try {
      problem.replaceChildren();
      await work();
      await refresh();
    } catch (error) { problem.replaceChildren(note(error.message, true)); }
  };

  function actions(key) {
    const path = `/admin/api/keys/${encodeURIComponent(key.id)}`;
    const ask = (question, yes, isBad) => confirmed(`${key.name}: ${t(question)}`, t(yes), t("Cancel"), { isBad });
    const button = (title, work, kind = "") => h("button", { class: `small plain ${kind}`, "aria-label": `${t(title)}: ${key.name}`, onclick: () => attempt(work) }, t(title));
    if (key.state === "revoked") return button("Delete", async () => { if (await ask("Delete this key permanently?", "Delete", true)) await api.remove(path); }, "bad");
    return h("div", { class: "row" },
      button("Edit", () => askForKey(t("Edit key"), key, (changes) => api.patch(path, changes))),
      button("Rotate", async () => { if (await ask("Give this key a new secret? The old one stays valid for 24 hours.", "Rotate", false)) showSecret(await api.post(`${path}/rotate`, {})); }),
      button("Revoke", async () => { if (await ask("Revoke this key? Its clients are refused within a second.", "Revoke", true)) await api.post(`${path}/revoke`); }, "bad"));
  }

  function showSecret(key) {
    const copied = h("span", { class: "muted small", role: "status" });
    const copy = h("button", { class: "small", onclick: async () => { await navigator.clipboard.writeText(key.secret); copied.textContent = t("Copied."); } }, icon("copy"), t("Copy"));
    fill(secret, h("div", { class: "note", role: "status" }, h("div", { class: "grow" }, h("p", {}, h("b", {}, key.name), " – ", t("This is the new secret. It is shown only once: copy it now.")),
      h("div", { class: "secret" }, h("code", { class: "wrap grow", id: "new-secret" }, key.secret), copied, copy))));
    secret.scrollIntoView({ block: "nearest" });
  }

  const make = h("button", { class: "primary", onclick: () => attempt(async () => {
    let made = null;
    await askForKey(t("New key"), null, async (fields) => { made = await api.post("/admin/api/keys", fields); });
    if (made) showSecret(made);
  }) }, icon("plus"), t("New key"));
  main.replaceChildren(pageHead(t("Keys"), make), problem, secret, list);
  attempt(async () => {});
}

function limits(key) {
  const set = Object.entries(SHORT_LIMITS).filter(([name]) => key[name] !== null);
  const kinds = [key.priority_class === "batch" && t("batch"), key.priority !== 1 && `${t("weight")} ${key.priority}`, key.networks.length > 0 && key.networks.join(", ")].filter(Boolean);
  if (set.length + kinds.length === 0) return null;
  const parts = [...set.map(([name, title]) => `${short(key[name])} ${t(title)}`), ...kinds];
  return h("span", {}, parts.map((part, i) => [i > 0 ? ", " : null, h("span", { class: "nowrap" }, part)]));
}
