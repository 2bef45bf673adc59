// Models page: load, unload and pin models, preview evictions, show the memory of devices, and downloads.

import { nameInPath } from "../api.js";
import { swatch } from "../chart.js";
import { confirmed, empty, fill, h, loading, note, pageHead, panelHead, svg } from "../dom.js";
import { bytes, number, seconds } from "../format.js";
import { t } from "../i18n.js";
import { icon } from "../icons.js";
import { downloadPanel } from "./downloads.js";
import { every } from "./every.js";
import { details, logOf } from "./model_details.js";

const KINDS = { ready: "ok", starting: "accent", sleeping: "accent", draining: "warn", stopping: "warn", failed: "bad" };
const COLOURS = 6;

export function models(main, { api }) {
  const problem = h("div", {});
  const lost = h("div", {});
  const list = h("section", { class: "panel flush open", "aria-label": t("Models") }, loading(t("Loading …")));
  const devices = h("section", { class: "panel" }, panelHead(t("Memory")));
  const downloads = downloadPanel(api, problem);
  const attempt = async (work) => {
    try {
      problem.replaceChildren();
      await work();
    } catch (error) { problem.replaceChildren(note(error.message, true)); }
  };
  const rows = new Rows(api, attempt);
  const add = h("button", { onclick: () => downloads.focus() }, icon("plus"), t("Add a model"));
  main.replaceChildren(pageHead(t("Models"), add), lost, problem, list, devices, downloads.element);
  return every(1000, lost, async () => {
    const [{ data }, status, { data: pulls }] = await Promise.all(
      [api.get("/admin/api/models"), api.get("/admin/api/status"), api.get("/admin/api/pulls")]);
    await rows.draw(list, data);
    fill(devices, panelHead(t("Memory")), h("div", { class: "stack" }, status.devices.map((one) => device(one, data))));
    downloads.draw(pulls);
  });
}

// Rows of models. An unchanged row is kept; a changed one keeps the focus.
class Rows {
  constructor(api, attempt) {
    this.api = api;
    this.attempt = attempt;
    this.shown = new Map();
    // Explanations by model, while the pointer or the focus is on Load.
    this.previews = new Map();
  }

  async draw(list, models) {
    if (models.length === 0) {
      fill(list, empty(icon("models"), t("No models yet"), t("Download one below, or add one to the configuration.")));
      this.shown.clear();
      return;
    }
    const tails = await Promise.all(models.map((model) => (model.state === "starting" ? this.api.find(`${logOf(model)}?lines=6`, "") : "")));
    const focus = document.activeElement?.dataset?.act;
    const rows = models.map((model, i) => {
      const text = JSON.stringify([model, tails[i]]);
      const before = this.shown.get(model.id);
      if (before?.text === text) return before.row;
      const row = this.row(model, tails[i]);
      this.shown.set(model.id, { text, row });
      return row;
    });
    if (rows.length === list.children.length && rows.every((row, i) => list.children[i] === row)) return;
    fill(list, rows);
    if (focus) list.querySelector(`[data-act="${CSS.escape(focus)}"]`)?.focus();
  }

  row(model, tail) {
    const isBusy = model.phase !== null || model.state === "starting";
    const facts = [
      model.engine, model.context_length && `${number(model.context_length)} ${t("tokens")}`, model.memory_bytes && bytes(model.memory_bytes),
      model.aliases.length > 0 && model.aliases.join(", "), model.load_seconds && `${t("loaded in")} ${seconds(model.load_seconds)}`,
      model.in_flight > 0 && `${model.in_flight} ${t("in flight")}`, model.queued > 0 && `${model.queued} ${t("queued")}`,
    ].filter(Boolean);
    const more = h("div", { class: "more stack", hidden: true });
    const element = h("div", { class: "model" },
      h("div", {}, h("div", { class: "row" }, h("span", { class: "name" }, model.id), h("span", { class: `tag dot ${KINDS[model.state] ?? ""}` }, t(model.state)),
        model.pinned ? h("span", { class: "tag accent" }, icon("pin"), t("pinned")) : null, model.preloaded ? h("span", { class: "tag" }, t("preloaded")) : null),
      h("div", { class: "facts-line" }, facts.map((fact) => h("span", {}, fact)))),
      h("div", { class: "row" }, this.actions(model)), more);
    if (isBusy) show(more, phases(model), tail ? h("pre", { class: "box tail", "aria-label": t("Log") }, tail.trimEnd()) : null);
    else if (model.error) show(more, h("div", { class: "preview bad wrap", role: "status" }, model.error));
    if (this.previews.has(model.id) && model.state !== "starting") preview(element, this.previews.get(model.id));
    return element;
  }

  actions(model) {
    const path = `/admin/api/models/${nameInPath(model.id)}`;
    const act = (name) => ({ "data-act": `${name} ${model.id}` });
    const isLoaded = !["stopped", "failed"].includes(model.state);
    const isLeaving = ["draining", "stopping"].includes(model.state);
    const send = (verb) => this.attempt(() => this.api.post(`${path}/${verb}`));
    const buttons = [h("button", { ...act("details"), onclick: () => this.attempt(() => details(model, path, this.api)) }, t("Details"))];
    if (model.twin_of === null && (model.pinned || (isLoaded && !isLeaving))) {
      buttons.push(h("button", { ...act("pin"), title: t("A pinned model is never evicted and stays loaded when idle."), onclick: () => send(model.pinned ? "unpin" : "pin") }, icon("pin"), model.pinned ? t("Unpin") : t("Pin")));
    }
    if (isLoaded) {
      buttons.push(h("button", { ...act("unload"), disabled: isLeaving, onclick: () => this.attempt(async () => {
        if (await confirmed(`${model.id}: ${t("Unload this model? Requests in flight finish first.")}`, t("Unload"), t("Cancel"))) await this.api.post(`${path}/unload?wait=false`);
      }) }, t("Unload")));
      return buttons;
    }
    const load = h("button", { ...act("load"), class: "primary", onclick: () => this.attempt(() => this.load(model, path)) }, t("Load"));
    const showPreview = async () => {
      const found = await this.api.get(`${path}/explain`).catch((error) => ({ verdict: "never", message: error.message, evict: [] }));
      if (!load.matches(":hover, :focus")) return;
      this.previews.set(model.id, found);
      preview(load.closest(".model"), found);
    };
    const hidePreview = () => {
      this.previews.delete(model.id);
      load.closest(".model")?.querySelector(".verdict")?.remove();
    };
    for (const [event, listen] of [["pointerenter", showPreview], ["focus", showPreview], ["pointerleave", hidePreview], ["blur", hidePreview]]) load.addEventListener(event, listen);
    return [...buttons, load];
  }

  // Ask for confirmation if other models would be evicted.
  async load(model, path) {
    const found = await this.api.get(`${path}/explain`);
    this.previews.delete(model.id);
    if (found.evict.length > 0 && !(await confirmed(`${t("Loading")} ${model.id} ${t("unloads:")} ${found.evict.join(", ")}`, t("Load"), t("Cancel"), { more: h("p", { class: "muted" }, found.message) }))) return;
    if (["never", "not_now"].includes(found.verdict)) throw new Error(`${model.id}: ${found.message}`);
    await this.api.post(`${path}/load?wait=false`);
  }
}

function show(more, ...children) {
  fill(more, children);
  more.hidden = false;
}

// The preview overlays the next row, so nothing moves under the pointer.
function preview(row, { verdict, message, evict }) {
  const kind = evict.length > 0 ? "warn" : ["never", "not_now"].includes(verdict) ? "bad" : "";
  row.querySelector(".verdict")?.remove();
  row.append(h("div", { class: `preview verdict wrap ${kind}`, role: "status" }, message));
}

function phases(model) {
  const over = Object.entries(model.phases).map(([name, took]) => h("span", { class: "tag ok" }, `${name.replaceAll("_", " ")} ${seconds(took)}`));
  return h("div", { class: "phases", role: "status" }, h("span", { class: "spinner" }), over, h("span", { class: "tag accent" }, `${(model.phase ?? "starting").replaceAll("_", " ")} …`));
}

function device(one, models) {
  const colour = (name) => `fill-${models.findIndex(({ id }) => id === name) % COLOURS}`;
  const parts = [...Object.entries(one.taken).map(([name, size]) => [name, size, colour(name)]), [t("other programs"), one.foreign, "fill-other"]].filter(([, size]) => size > 0);
  let at = 0;
  const rects = parts.map(([name, size, kind]) => {
    const width = (100 * size) / one.total;
    const rect = svg("rect", { x: at, y: 0, width, height: 10, class: kind }, svg("title", {}, `${name}: ${bytes(size)}`));
    at += width;
    return rect;
  });
  const words = [...parts.map(([name, size]) => `${name} ${bytes(size)}`), `${t("free")} ${bytes(one.free)}`].join(", ");
  return h("div", {}, h("div", { class: "row" }, h("span", { class: "strong" }, one.name), h("span", { class: "grow" }), h("span", { class: "muted small" }, `${bytes(one.free)} ${t("free")} / ${bytes(one.total)}`)),
    svg("svg", { class: "meter", viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": `${one.name}: ${words}` }, rects),
    h("div", { class: "legend" }, parts.map(([name, size, kind]) => h("span", {}, swatch(kind), `${name} ${bytes(size)}`))));
}
