// Form of a key, to create or to change it.

import { check, choice, dialog, field, fill, h, note } from "../dom.js";
import { t } from "../i18n.js";
import { icon } from "../icons.js";

const PERMISSIONS = ["all", "chat", "completions", "embeddings", "rerank", "audio", "responses", "messages", "tokenize", "batch", "models", "metrics", "admin"];
const LIMITS = {
  requests_per_minute: "Requests per minute", tokens_per_minute: "Tokens per minute", max_concurrent: "Concurrent requests",
  tokens_per_day: "Tokens per day", tokens_per_month: "Tokens per month",
};

// Show the form until `save` accepts the fields, or it is closed. If `key` is given, `save` gets only the changed fields.
export function askForKey(title, key, save) {
  const inputs = inputsOf(key);
  const problem = h("div", {});
  return dialog(title, (close) => h("form", {
    class: "stack",
    onsubmit: async (event) => {
      event.preventDefault();
      const fields = read(inputs);
      try {
        await save(key === null ? withoutEmpty(fields) : differing(fields, read(inputsOf(key))));
        close();
      } catch (error) { fill(problem, note(error.message, true)); problem.scrollIntoView({ block: "nearest" }); }
    },
  }, h("h2", {}, key === null ? title : `${title}: ${key.name}`),
  h("div", { class: "grid" }, field(t("Name"), inputs.name), field(t("Note"), inputs.note, t("Owner or purpose."))),
  h("fieldset", {}, h("legend", {}, t("Permissions")), h("div", { class: "chips" }, Object.values(inputs.permissions))),
  field(t("Allowed models"), inputs.models, t("Names or patterns such as qwen*, separated by commas. * allows all.")),
  h("h3", {}, t("Limits")), h("div", { class: "grid" }, Object.entries(LIMITS).map(([name, label]) => field(t(label), inputs[name]))),
  h("h3", {}, t("Priority and validity")),
  h("div", { class: "grid" }, field(t("Priority class"), inputs.priority_class, t("batch: served only when no other request is waiting.")), field(t("Weight"), inputs.priority, t("Share relative to other keys while requests wait.")),
    field(t("Expires"), inputs.expires_at, t("30d or 2027-01-31. Empty: never.")), field(t("Allowed networks"), inputs.networks, t("Such as 10.0.0.0/8. Empty: all."))),
  inputs.enabled, problem,
  h("footer", {}, h("button", { type: "button", onclick: () => close() }, t("Cancel")), h("button", { class: "primary", type: "submit" }, key === null ? [icon("plus"), t("Create")] : t("Save")))));
}

function inputsOf(key) {
  const permissions = key?.permissions ?? ["all"];
  const priority = choice(t("Priority class"), [["interactive", t("interactive")], ["batch", t("batch")]], { name: "priority_class" });
  priority.value = key?.priority_class ?? "interactive";
  return {
    name: h("input", { name: "name", required: true, value: key?.name ?? "" }),
    note: h("input", { name: "note", value: key?.note ?? "" }),
    permissions: Object.fromEntries(PERMISSIONS.map((name) => [name, check(name, permissions.includes(name))])),
    models: h("input", { name: "models", value: (key?.models ?? ["*"]).join(", ") }),
    ...Object.fromEntries(Object.keys(LIMITS).map((name) => [name, h("input", { name, type: "number", min: 1, placeholder: t("no limit"), value: key?.[name] ?? "" })])),
    priority_class: priority,
    priority: h("input", { name: "priority", type: "number", min: 0.01, step: "any", value: key?.priority ?? 1 }),
    expires_at: h("input", { name: "expires_at", placeholder: t("never"), value: key?.expires_at ? new Date(key.expires_at * 1000).toISOString().replace(/\.\d+/, "") : "" }),
    networks: h("input", { name: "networks", placeholder: t("all"), value: (key?.networks ?? []).join(", ") }),
    enabled: check(t("Enabled"), key?.enabled ?? true),
  };
}

function read(inputs) {
  const list = (input) => input.value.split(/[\s,]+/).filter(Boolean);
  const isOn = (label) => label.querySelector("input").checked;
  return {
    name: inputs.name.value.trim(),
    note: inputs.note.value.trim() || null,
    permissions: PERMISSIONS.filter((name) => isOn(inputs.permissions[name])),
    models: list(inputs.models),
    ...Object.fromEntries(Object.keys(LIMITS).map((name) => [name, inputs[name].value ? Number(inputs[name].value) : null])),
    priority_class: inputs.priority_class.value,
    priority: Number(inputs.priority.value),
    expires_at: inputs.expires_at.value.trim() || null,
    networks: list(inputs.networks),
    enabled: isOn(inputs.enabled),
  };
}

function withoutEmpty(fields) {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null));
}

function differing(fields, before) {
  return Object.fromEntries(Object.entries(fields).filter(([name, value]) => JSON.stringify(value) !== JSON.stringify(before[name])));
}
