// Keys: made, limited, rotated, revoked. A new secret is shown once.

import { confirmed, field, h, note, pageHead, table } from "../dom.js";
import { number, time } from "../format.js";
import { t } from "../i18n.js";

const LIMITS = { requests_per_minute: "Requests per minute", tokens_per_minute: "Tokens per minute", tokens_per_day: "Tokens per day", max_concurrent: "At the same time" };
const KINDS = { active: "ok", disabled: "warn", expired: "warn", revoked: "bad" };

export function keys(main, { api }) {
  const problem = h("div", {});
  const secret = h("div", {});
  const list = h("div", { class: "panel" }, h("p", { class: "muted" }, t("Loading …")));

  async function refresh() {
    const { data } = await api.get("/admin/api/keys");
    list.replaceChildren(table([
      [t("Name"), (key) => h("span", {}, h("b", {}, key.name), key.note ? h("div", { class: "muted small" }, key.note) : null)],
      [t("State"), (key) => h("span", { class: `tag ${KINDS[key.state]}` }, t(key.state))],
      [t("From"), (key) => t(key.source)],
      [t("Permissions"), (key) => key.permissions.join(", ")],
      [t("Models"), (key) => key.models.join(", ")],
      [t("Limits"), (key) => Object.entries(LIMITS).filter(([name]) => key[name] !== null).map(([name, title]) => h("div", { class: "small" }, `${t(title)}: ${number(key[name])}`))],
      [t("Ends"), (key) => time(key.expires_at)],
      [t("Last used"), (key) => time(key.last_used_at)],
      ["", (key) => (key.source === "store" ? actions(key) : "")],
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
    const ask = (question) => confirmed(`${key.name}: ${t(question)}`, t("Yes"), t("Cancel"));
    if (key.state === "revoked") {
      return h("button", { class: "bad", onclick: () => attempt(async () => { if (await ask("Delete this key for good?")) await api.remove(path); }) }, t("Delete"));
    }
    return h("div", { class: "row" },
      h("button", { onclick: () => attempt(async () => { if (await ask("Give it a new secret? The old one works for another day.")) showSecret(await api.post(`${path}/rotate`, {})); }) }, t("Rotate")),
      h("button", { class: "bad", onclick: () => attempt(async () => { if (await ask("Revoke this key? Clients that use it are refused within a second.")) await api.post(`${path}/revoke`); }) }, t("Revoke")));
  }

  function showSecret(key) {
    const copy = h("button", { onclick: () => navigator.clipboard.writeText(key.secret) }, t("Copy"));
    secret.replaceChildren(h("div", { class: "note", role: "status" }, h("p", {}, t("This is the key. It is shown once: copy it now.")),
      h("div", { class: "row" }, h("code", { class: "wrap", id: "new-secret" }, key.secret), copy)));
  }

  const inputs = {
    name: h("input", { name: "name", required: true }),
    permissions: h("input", { name: "permissions", placeholder: "all" }),
    models: h("input", { name: "models", placeholder: "*" }),
    expires_at: h("input", { name: "expires_at", placeholder: t("such as 30d") }),
  };
  const limits = Object.fromEntries(Object.keys(LIMITS).map((name) => [name, h("input", { name, type: "number", min: 1 })]));
  const form = h("form", {
    onsubmit: (event) => {
      event.preventDefault();
      const wanted = { name: inputs.name.value.trim() };
      for (const name of ["permissions", "models"]) if (inputs[name].value.trim()) wanted[name] = inputs[name].value.split(/[\s,]+/).filter(Boolean);
      if (inputs.expires_at.value.trim()) wanted.expires_at = inputs.expires_at.value.trim();
      for (const [name, input] of Object.entries(limits)) if (input.value) wanted[name] = Number(input.value);
      attempt(async () => { showSecret(await api.post("/admin/api/keys", wanted)); form.reset(); });
    },
  }, h("div", { class: "grid" }, field(t("Name"), inputs.name), field(t("Permissions"), inputs.permissions), field(t("Models it may use"), inputs.models),
    Object.entries(LIMITS).map(([name, title]) => field(t(title), limits[name])), field(t("Ends"), inputs.expires_at), h("button", { class: "primary", type: "submit" }, t("Create"))));
  main.replaceChildren(pageHead(t("Keys")), problem, h("div", { class: "panel" }, h("h2", {}, t("New key")), form, secret), list);
  attempt(async () => {});
}
