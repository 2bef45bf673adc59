// Panel of downloads: start, watch, cancel.

import { field, fill, h, note, panelHead } from "../dom.js";
import { bytes, seconds } from "../format.js";
import { t } from "../i18n.js";
import { icon } from "../icons.js";

const KINDS = { running: "accent", done: "ok", failed: "bad", cancelled: "" };

// Return the element; `draw` shows the downloads, `focus` moves to the form.
export function downloadPanel(api, problem) {
  const source = h("input", { name: "source", required: true, placeholder: "Qwen/Qwen3-0.6B-GGUF" });
  const optional = {
    file: h("input", { name: "file", placeholder: "Q4_K_M" }),
    revision: h("input", { name: "revision", placeholder: "main" }),
    name: h("input", { name: "name" }),
  };
  const list = h("div", {});
  const form = h("form", {
    class: "stack",
    onsubmit: async (event) => {
      event.preventDefault();
      const wanted = Object.fromEntries(Object.entries(optional).map(([key, input]) => [key, input.value.trim()]).filter(([, value]) => value));
      try {
        problem.replaceChildren();
        await api.post("/admin/api/models/pull", { source: source.value, ...wanted });
        form.reset();
      } catch (error) { problem.replaceChildren(note(error.message, true)); }
    },
  }, field(t("Source"), source, t("org/name on Hugging Face, ms:org/name on ModelScope, the URL of a .gguf file, or starter")),
  h("div", { class: "grid" }, field(t("Quantization or file (optional)"), optional.file), field(t("Revision (optional)"), optional.revision), field(t("Name (optional)"), optional.name)),
  h("div", { class: "row" }, h("button", { class: "primary", type: "submit" }, icon("download"), t("Download"))));
  let text = "[]";
  const draw = (downloads) => {
    if (JSON.stringify(downloads) === text) return;
    text = JSON.stringify(downloads);
    fill(list, downloads.toReversed().map((one) => download(one, api, problem)));
    list.className = downloads.length > 0 ? "downloads" : "";
  };
  const element = h("section", { class: "panel" }, panelHead(t("Add a model")), form, list);
  return { element, draw, focus: () => { source.focus(); element.scrollIntoView({ block: "center" }); } };
}

function download(one, api, problem) {
  const isRunning = one.state === "running";
  const words = [one.total && `${bytes(one.bytes)} / ${bytes(one.total)}`, one.speed && `${bytes(one.speed)}/s`, one.left && `${seconds(one.left)} ${t("left")}`, one.model, one.note].filter(Boolean);
  const remove = async () => { try { await api.remove(`/admin/api/pulls/${one.id}`); } catch (error) { problem.replaceChildren(note(error.message, true)); } };
  return h("div", { class: "model" },
    h("div", {}, h("div", { class: "row" }, h("span", { class: "name" }, one.source), h("span", { class: `tag ${KINDS[one.state]}` }, t(one.state))),
      h("div", { class: "facts-line" }, words.map((word) => h("span", {}, word)))),
    h("button", { onclick: remove }, isRunning ? t("Cancel") : t("Dismiss")),
    isRunning && one.total ? h("div", { class: "more" }, h("progress", { max: one.total, value: one.bytes, "aria-label": one.source })) : null,
    one.error ? h("div", { class: "more preview bad wrap" }, one.error) : null);
}
