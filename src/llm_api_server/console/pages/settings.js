// What runs, by what configuration; the file read again, with what changes.

import { h, note, pageHead, table } from "../dom.js";
import { t } from "../i18n.js";

const EFFECTS = { now: "at once", model: "loads the model anew", restart: "needs a restart" };

export function settings(main, { api }) {
  const problem = h("div", {});
  const changes = h("div", {});
  const content = h("div", {}, h("p", { class: "muted" }, t("Loading …")));

  async function reload(isDryRun) {
    try {
      const found = await api.post(`/admin/api/reload?dry_run=${isDryRun}`);
      const said = found.changes.length === 0 ? t("Nothing changes.") : found.applied ? t("Applied.") : "";
      changes.replaceChildren(h("div", { class: "panel" }, said ? note(said) : null, found.changes.length === 0 ? null : table([
        ["", (change) => h("code", { class: "wrap" }, change.path)], ["", (change) => `${change.before ?? "–"} → ${change.after ?? "–"}`], ["", (change) => t(EFFECTS[change.effect])],
      ], found.changes)));
      problem.replaceChildren();
      if (found.applied) await refresh();
    } catch (error) { problem.replaceChildren(note(error.message, true)); }
  }

  async function refresh() {
    const [status, config] = await Promise.all([api.get("/admin/api/status"), api.get("/admin/api/config")]);
    content.replaceChildren(
      h("div", { class: "panel" }, table([["", ([name]) => h("span", { class: "muted" }, name)], ["", ([, value]) => h("code", { class: "wrap" }, value)]], [
        [t("Version"), status.version], [t("Configuration file"), config.file], [t("Manager"), `pid ${status.manager}`], [t("Workers"), status.workers.map((pid) => `pid ${pid}`).join(", ")],
      ])),
      h("div", { class: "panel" }, h("h2", {}, t("Effective options")), Object.entries(config.options).map(([name, options]) => h("details", {}, h("summary", {}, name), h("pre", { class: "box" }, JSON.stringify(options, null, 2))))));
  }

  main.replaceChildren(pageHead(t("Settings"), h("button", { onclick: () => reload(true) }, t("What would change?")), h("button", { class: "primary", onclick: () => reload(false) }, t("Reload"))), problem, changes, content);
  refresh().catch((error) => problem.replaceChildren(note(error.message, true)));
}
