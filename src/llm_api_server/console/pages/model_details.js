// Details of one model: its facts, whether it fits, the end of its log, and its removal.

import { check, confirmed, dialog, facts, h } from "../dom.js";
import { bytes, number, seconds, time } from "../format.js";
import { t } from "../i18n.js";
import { icon } from "../icons.js";

export function logOf(model) {
  return `/admin/api/logs/engines/${encodeURIComponent(model.id.replaceAll("/", "_"))}`;
}

export async function details(model, path, api) {
  const [explanation, log] = await Promise.all([
    api.get(`${path}/explain`).catch((error) => ({ message: error.message, needs: null })), api.find(`${logOf(model)}?lines=60`, "")]);
  const isGone = ["stopped", "failed"].includes(model.state);
  const wanted = await dialog(model.id, (close) => [
    h("header", {}, h("h2", {}, model.id), h("button", { class: "plain icon-only small", "aria-label": t("Close"), title: t("Close"), onclick: () => close() }, icon("close"))),
    h("div", { class: "stack" },
      h("div", { class: "preview wrap" }, explanation.message),
      facts([
        [t("State"), t(model.state)], [t("Error"), model.error], [t("Engine"), model.engine], [t("Path"), h("code", {}, model.path)],
        [t("Tasks"), (model.tasks ?? []).join(", ")], [t("Context length"), model.context_length && `${number(model.context_length)} ${t("tokens")}`], [t("Image input"), model.vision === null ? null : model.vision ? t("Yes") : t("No")],
        [t("Aliases"), model.aliases.join(", ")], [t("Adapters"), model.adapters.join(", ")], [t("Required memory"), explanation.needs],
        [t("Process"), model.pid && `pid ${model.pid}`], [t("Memory"), model.memory_bytes && bytes(model.memory_bytes)],
        [t("Reserved memory"), Object.entries(model.devices).map(([name, size]) => `${name} ${bytes(size)}`).join(", ")],
        [t("Loaded at"), time(model.loaded_at)], [t("Load time"), model.load_seconds && seconds(model.load_seconds)],
        [t("Load phases"), Object.entries(model.phases).map(([name, took]) => `${name.replaceAll("_", " ")} ${seconds(took)}`).join(", ")], [t("Last used"), time(model.last_used)],
      ]),
      log ? h("pre", { class: "box", tabindex: 0, "aria-label": t("Log") }, log.trimEnd()) : null),
    h("footer", {}, model.twin_of === null ? h("button", { class: "bad", disabled: !isGone, title: isGone ? "" : t("Unload the model first."), onclick: () => close("remove") }, t("Remove …")) : null,
      h("span", { class: "grow" }), h("button", { onclick: () => close() }, t("Close"))),
  ]);
  if (wanted === "remove") await remove(model, path, api);
}

async function remove(model, path, api) {
  let keeps = false;
  const more = check(t("Keep its files and only remove it from the configuration"), false, (on) => { keeps = on; });
  if (!(await confirmed(`${model.id}: ${t("Remove this model and delete its files?")}`, t("Remove"), t("Cancel"), { isBad: true, more: h("p", {}, more) }))) return;
  await api.remove(`${path}?keep_files=${keeps}`);
}
