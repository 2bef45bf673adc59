// Models and what they take of the devices, live; downloads.

import { nameInPath } from "../api.js";
import { confirmed, field, h, note, pageHead, svg } from "../dom.js";
import { bytes, number, seconds } from "../format.js";
import { t } from "../i18n.js";
import { every } from "./every.js";

const KINDS = { ready: "ok", starting: "warn", draining: "warn", stopping: "warn", failed: "bad" };

export function models(main, { api }) {
  const problem = h("div", {});
  const list = h("div", { class: "panel", "aria-live": "polite" }, h("p", { class: "muted" }, t("Loading …")));
  const devices = h("div", { class: "panel" });
  const pulls = h("div", {});
  main.replaceChildren(pageHead(t("Models")), problem, list, devices, pullPanel(api, pulls, problem));
  const shown = new Map();
  return every(1000, problem, async () => {
    const [{ data }, status, { data: downloads }] = await Promise.all(
      [api.get("/admin/api/models"), api.get("/admin/api/status"), api.get("/admin/api/pulls")]);
    drawList(list, shown, data, api, problem);
    devices.replaceChildren(h("h2", {}, t("Memory")), ...status.devices.map(device));
    pulls.replaceChildren(...downloads.toReversed().map((one) => pull(one, api, problem)));
  });
}

// Rows that have not changed stay, so that the focus does.
function drawList(list, shown, data, api, problem) {
  if (data.length === 0) {
    list.replaceChildren(h("div", { class: "empty" }, h("h2", {}, t("No models yet")), t("Download one below, or add it to the configuration.")));
    shown.clear();
    return;
  }
  const rows = data.map((model) => {
    const text = JSON.stringify(model);
    const before = shown.get(model.id);
    if (before?.text === text) return before.row;
    const row = modelRow(model, api, problem);
    shown.set(model.id, { text, row });
    return row;
  });
  if (rows.length !== list.children.length || rows.some((row, i) => list.children[i] !== row)) list.replaceChildren(...rows);
}

function modelRow(model, api, problem) {
  const path = `/admin/api/models/${nameInPath(model.id)}`;
  const attempt = async (work) => { try { await work(); } catch (error) { problem.replaceChildren(note(error.message, true)); } };
  const isLoaded = !["stopped", "failed"].includes(model.state);
  const act = isLoaded
    ? h("button", { disabled: ["draining", "stopping"].includes(model.state), onclick: () => attempt(async () => {
      if (await confirmed(`${model.id}: ${t("Unload it? Requests under way finish first.")}`, t("Unload"), t("Cancel"))) await api.post(`${path}/unload?wait=false`);
    }) }, t("Unload"))
    : h("button", { class: "primary", onclick: () => attempt(() => api.post(`${path}/load?wait=false`)) }, t("Load"));
  const facts = [
    model.engine, model.context_length && `${number(model.context_length)} tokens`, model.memory_bytes && bytes(model.memory_bytes),
    model.in_flight > 0 && `${model.in_flight} ${t("in flight")}`, model.queued > 0 && `${model.queued} ${t("queued")}`,
    model.aliases.length > 0 && model.aliases.join(", "), model.load_seconds && `${t("Load")}: ${seconds(model.load_seconds)}`,
  ].filter(Boolean).join(" · ");
  const phases = Object.entries(model.phases).map(([name, took]) => `${name.replaceAll("_", " ")} ${seconds(took)}`).join(" · ");
  return h("div", { class: "model" },
    h("div", {}, h("span", { class: "name" }, model.id), " ", h("span", { class: `tag ${KINDS[model.state] ?? ""}` }, t(model.state)),
      model.phase ? h("span", { class: "muted small" }, ` ${model.phase.replaceAll("_", " ")} …`) : null,
      h("div", { class: "muted small" }, facts),
      model.state === "starting" && phases ? h("div", { class: "muted small" }, phases) : null,
      model.error ? h("div", { class: "bad-text small wrap" }, model.error) : null),
    h("div", { class: "row" }, h("button", { onclick: () => attempt(() => details(model, path, api)) }, t("Details")), act));
}

async function details(model, path, api) {
  const explanation = await api.get(`${path}/explain`);
  let log = "";
  try { log = await api.text(`/admin/api/logs/engines/${encodeURIComponent(model.id.replaceAll("/", "_"))}?lines=40`); } catch { /* it was never loaded */ }
  const box = h("dialog", { "aria-label": model.id }, h("h2", {}, model.id), h("p", {}, explanation.message),
    explanation.needs ? h("p", { class: "muted" }, explanation.needs) : null,
    h("pre", { class: "box" }, JSON.stringify(model, null, 2)), log ? h("pre", { class: "box" }, log) : null,
    h("div", { class: "row end" }, h("button", { onclick: () => box.close() }, t("Close"))));
  box.addEventListener("close", () => box.remove());
  document.body.append(box);
  box.showModal();
}

function device(one) {
  const parts = [...Object.entries(one.taken).map(([name, size]) => [name, size, "used"]), [t("other programs"), one.foreign, "other"]];
  let at = 0;
  const rects = parts.map(([name, size, kind]) => {
    const width = (100 * size) / one.total;
    const rect = svg("rect", { x: at, y: 0, width, height: 10, class: kind }, svg("title", {}, `${name}: ${bytes(size)}`));
    at += width;
    return rect;
  });
  const named = parts.filter(([, size]) => size > 0).map(([name, size]) => `${name} ${bytes(size)}`);
  const words = [...named, `${t("free")} ${bytes(one.free)}`].join(" · ");
  return h("div", {}, h("div", { class: "row" }, h("b", {}, one.name), h("span", { class: "muted" }, bytes(one.total))),
    svg("svg", { class: "meter", viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": words }, rects),
    h("p", { class: "muted small" }, words));
}

function pullPanel(api, pulls, problem) {
  const source = h("input", { name: "source", required: true, placeholder: "Qwen/Qwen3-0.6B-GGUF" });
  const name = h("input", { name: "name" });
  const file = h("input", { name: "file", placeholder: "Q4_K_M" });
  const revision = h("input", { name: "revision", placeholder: "main" });
  const form = h("form", {
    onsubmit: async (event) => {
      event.preventDefault();
      const optional = { name, file, revision };
      const wanted = Object.fromEntries(Object.entries(optional).map(([key, input]) => [key, input.value.trim()]).filter(([, value]) => value));
      try {
        await api.post("/admin/api/models/pull", { source: source.value, ...wanted });
        form.reset();
      } catch (error) { problem.replaceChildren(note(error.message, true)); }
    },
  }, h("p", { class: "muted small" }, t("org/name of Hugging Face, ms:org/name, a URL of a .gguf file, or starter")),
  h("div", { class: "grid" }, field(t("Source"), source), field(t("Quantization or file (optional)"), file),
    field(t("Revision (optional)"), revision), field(t("Name (optional)"), name), h("button", { class: "primary", type: "submit" }, t("Download"))));
  return h("div", { class: "panel" }, h("h2", {}, t("Add a model")), form, pulls);
}

function pull(one, api, problem) {
  const isRunning = one.state === "running";
  const words = [t(one.state), one.total && `${bytes(one.bytes)} / ${bytes(one.total)}`, one.speed && `${bytes(one.speed)}/s`,
    one.left && `${seconds(one.left)} ${t("left")}`, one.model, one.note].filter(Boolean).join(" · ");
  const remove = async () => { try { await api.remove(`/admin/api/pulls/${one.id}`); } catch (error) { problem.replaceChildren(note(error.message, true)); } };
  return h("div", { class: "model" }, h("div", {}, h("span", { class: "name" }, one.source),
    isRunning && one.total ? h("progress", { max: one.total, value: one.bytes, "aria-label": one.source }) : null,
    h("div", { class: "muted small" }, words), one.error ? h("div", { class: "bad-text small wrap" }, one.error) : null),
  h("button", { onclick: remove }, isRunning ? t("Cancel") : t("Forget")));
}
