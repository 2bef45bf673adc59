// Settings page: processes, effective configuration, and reload with its changes.

import { confirmed, facts, fill, h, loading, note, pageHead, panelHead, table } from "../dom.js";
import { t } from "../i18n.js";

const EFFECTS = { now: ["immediately", "ok"], model: ["after reloading the model", "warn"], restart: ["after a restart", "bad"] };

export function settings(main, { api }) {
  const problem = h("div", {});
  const changes = h("div", {});
  const content = h("div", {}, loading(t("Loading …")));

  async function attempt(work) {
    try {
      problem.replaceChildren();
      await work();
    } catch (error) { problem.replaceChildren(note(error.message, true)); }
  }

  async function preview() {
    const found = await api.post("/admin/api/reload?dry_run=true");
    fill(changes, found.changes.length === 0 ? note(t("No changes.")) : changed(t("Pending changes"), found.changes));
  }

  async function reload() {
    const { changes: coming } = await api.post("/admin/api/reload?dry_run=true");
    if (coming.length > 0 && !(await confirmed(t("Apply the current configuration file?"), t("Reload"), t("Cancel"), { more: h("ul", {}, coming.map(({ path }) => h("li", {}, h("code", { class: "wrap" }, path)))) }))) return;
    const found = await api.post("/admin/api/reload");
    fill(changes, note(found.changes.length === 0 ? t("No changes.") : t("Applied.")), found.changes.length === 0 ? null : changed(t("Applied changes"), found.changes));
    await refresh();
  }

  async function refresh() {
    const [status, config] = await Promise.all([api.get("/admin/api/status"), api.get("/admin/api/config")]);
    const pids = (list) => h("span", { class: "mono" }, list.map((pid) => `pid ${pid}`).join(", "));
    fill(content,
      h("section", { class: "panel" }, panelHead(t("Server")), facts([
        [t("Version"), status.version], [t("Configuration file"), h("code", {}, config.file)], [t("Manager"), pids([status.manager])], [t("Workers"), pids(status.workers)],
      ])),
      h("section", { class: "panel flush" }, panelHead(t("Effective configuration"), h("span", { class: "muted small" }, t("Secrets are hidden."))), h("div", {},
        Object.entries(config.options).map(([name, options]) => h("details", {}, h("summary", {}, name), facts(flat(options).map(([path, value]) => [h("code", {}, path), h("code", {}, value)])))))));
  }

  main.replaceChildren(pageHead(t("Settings"), h("button", { onclick: () => attempt(preview) }, t("Preview changes")), h("button", { class: "primary", onclick: () => attempt(reload) }, t("Reload"))), problem, changes, content);
  attempt(refresh);
}

function changed(title, list) {
  return h("section", { class: "panel flush" }, panelHead(title), h("div", {}, table(title, [
    [t("Option"), ({ path }) => h("code", { class: "wrap" }, path)], [t("Before"), ({ before }) => before !== null && h("code", { class: "wrap" }, before)], [t("After"), ({ after }) => after !== null && h("code", { class: "wrap" }, after)],
    [t("Takes effect"), ({ effect }) => h("span", { class: `tag ${EFFECTS[effect][1]}` }, t(EFFECTS[effect][0]))],
  ], list)));
}

// Return [path, value as text] for every option that is not a mapping.
function flat(value, path = "") {
  if (value !== null && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length > 0) {
    return Object.entries(value).flatMap(([name, one]) => flat(one, path ? `${path}.${name}` : name));
  }
  if (Array.isArray(value) && value.some((one) => typeof one === "object")) return value.flatMap((one, i) => flat(one, `${path}[${i}]`));
  return [[path, typeof value === "string" ? value || '""' : JSON.stringify(value)]];
}
