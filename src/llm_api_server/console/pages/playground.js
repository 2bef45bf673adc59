// Playground page: a streamed chat with text, images and tools, and its timings.

import { empty, field, fill, h, note, pageHead } from "../dom.js";
import { seconds } from "../format.js";
import { t } from "../i18n.js";
import { icon } from "../icons.js";
import { asCurl, asPython } from "./snippets.js";

const TOOLS = '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]';

export function playground(main, { api }) {
  const problem = h("div", {});
  const select = h("select", { name: "model" });
  const inputs = {
    system: h("textarea", { rows: 3, name: "system", placeholder: t("You are a helpful assistant.") }),
    temperature: h("input", { type: "number", min: 0, max: 2, step: 0.1, value: 0.7, name: "temperature" }),
    max_tokens: h("input", { type: "number", min: 1, value: 512, name: "max_tokens" }),
    top_p: h("input", { type: "number", min: 0, max: 1, step: 0.05, name: "top_p", placeholder: "1" }),
    seed: h("input", { type: "number", step: 1, name: "seed", placeholder: t("random") }),
    tools: h("textarea", { rows: 5, name: "tools", class: "mono", placeholder: TOOLS }),
  };
  const chat = h("div", { class: "chat", role: "log", "aria-live": "polite", tabindex: 0, "aria-label": t("Chat") });
  const input = h("textarea", { rows: 2, name: "message", "aria-label": t("Message"), placeholder: t("Message (Enter to send, Shift+Enter for a new line)") });
  const picture = h("input", { type: "file", accept: "image/*", name: "picture", "aria-label": t("Image"), onchange: () => showPicture() });
  const chosen = h("span", { class: "row muted small" });
  const copied = h("span", { class: "muted small", role: "status" });
  const send = h("button", { class: "primary", type: "submit" });
  let messages = [];
  let running = null;

  function start() {
    running?.abort();
    messages = [];
    fill(chat, empty(icon("playground"), t("Try a model"), t("Responses appear here, token by token.")));
  }

  function show(isRunning) {
    fill(send, icon(isRunning ? "stop" : "send"), isRunning ? t("Stop") : t("Send"));
  }

  function showPicture() {
    const file = picture.files[0];
    fill(chosen, file ? [file.name, h("button", { type: "button", class: "plain small icon-only", "aria-label": t("Remove the image"), onclick: () => { picture.value = ""; showPicture(); } }, icon("close"))] : []);
  }

  // Body of the request. Throws an `Error` if the tools are not JSON.
  function body() {
    const system = inputs.system.value.trim();
    const found = { model: select.value, messages: [...(system ? [{ role: "system", content: system }] : []), ...messages] };
    if (inputs.max_tokens.value) found.max_tokens = Number(inputs.max_tokens.value);
    for (const name of ["temperature", "top_p", "seed"]) if (inputs[name].value) found[name] = Number(inputs[name].value);
    if (inputs.tools.value.trim()) {
      try { found.tools = JSON.parse(inputs.tools.value); } catch (error) { throw new Error(`${t("Tools (JSON)")}: ${error.message}`, { cause: error }); }
    }
    return found;
  }

  async function stream(wanted) {
    const turn = new Turn(chat);
    const control = running = new AbortController();
    show(true);
    let isComplete = false;
    try {
      await api.events("POST", "/v1/chat/completions", { ...wanted, stream: true, stream_options: { include_usage: true } }, (event) => turn.add(event), control.signal);
      isComplete = true;
    } catch (error) {
      if (error.name !== "AbortError") problem.replaceChildren(note(t("Failed: ") + error.message, true));
    }
    const isCurrent = running === control;
    if (isCurrent) { running = null; show(false); }
    turn.end(isComplete);
    return isCurrent ? turn.message : null;
  }

  async function onSend(event) {
    event.preventDefault();
    if (running) { running.abort(); return; }
    const text = input.value.trim();
    if (!text) return;
    problem.replaceChildren();
    const file = picture.files[0];
    const image = file ? await dataUrl(file) : null;
    messages.push({ role: "user", content: image ? [{ type: "text", text }, { type: "image_url", image_url: { url: image } }] : text });
    let wanted;
    try { wanted = body(); } catch (error) {
      messages.pop();
      problem.replaceChildren(note(error.message, true));
      return;
    }
    if (messages.length === 1) chat.replaceChildren();
    const own = h("div", { class: "turn user" }, h("div", { class: "bubble" }, image ? h("img", { src: image, alt: file.name }) : null, text));
    chat.append(own);
    input.value = picture.value = "";
    showPicture();
    const now = messages;
    const reply = await stream(wanted);
    if (reply) now.push(reply);
    else if (now === messages) { now.pop(); own.remove(); input.value = text; if (now.length === 0) start(); }
    input.focus();
  }

  async function copy(make) {
    try {
      problem.replaceChildren();
      await navigator.clipboard.writeText(make(messages.length > 0 ? body() : { ...body(), messages: [{ role: "user", content: input.value || "Hello!" }] }, location.origin));
      copied.textContent = t("Copied.");
      setTimeout(() => { copied.textContent = ""; }, 2000);
    } catch (error) { problem.replaceChildren(note(error.message, true)); }
  }

  const form = h("form", { class: "compose", onsubmit: onSend }, input,
    h("div", { class: "row" }, h("label", { class: "button file" }, icon("picture"), t("Image"), picture), chosen, h("span", { class: "grow" }), send));
  input.addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); } });
  main.replaceChildren(
    pageHead(t("Playground"), copied, h("button", { onclick: () => copy(asCurl) }, icon("copy"), t("Copy as curl")), h("button", { onclick: () => copy(asPython) }, icon("copy"), t("Copy as Python")), h("button", { onclick: start }, icon("plus"), t("New chat"))), problem,
    h("div", { class: "playground" }, h("section", { class: "panel talk" }, chat, form),
      h("section", { class: "panel stack aside", "aria-label": t("Parameters") }, field(t("Model"), select), field(t("System prompt"), inputs.system),
        h("div", { class: "grid" }, field(t("Temperature"), inputs.temperature), field(t("Max tokens"), inputs.max_tokens)),
        h("details", {}, h("summary", {}, t("More parameters")), h("div", { class: "stack" }, field("top_p", inputs.top_p), field("seed", inputs.seed), field(t("Tools (JSON)"), inputs.tools, t("Tool calls are shown, not executed.")))))));
  start();
  show(false);
  api.get("/v1/models").then(({ data }) => {
    const able = data.filter((model) => !model.tasks || model.tasks.includes("generate"));
    fill(select, able.map((model) => h("option", { value: model.id }, model.id)));
    const ready = able.find((model) => model.status === "ready");
    if (ready) select.value = ready.id;
    if (able.length === 0) problem.replaceChildren(note(t("This key may not use any chat model.")));
  }, (error) => problem.replaceChildren(note(error.message, true)));
  return () => running?.abort();
}

// One response while it streams.
class Turn {
  constructor(chat) {
    this.chat = chat;
    this.think = h("div", { class: "bubble think" });
    this.bubble = h("div", { class: "bubble" }, h("span", { class: "spinner" }));
    this.figures = h("div", { class: "figures", role: "status" });
    this.element = h("div", { class: "turn" }, this.bubble, this.figures);
    this.began = performance.now();
    this.first = null;
    this.text = "";
    this.calls = [];
    this.count = 0;
    chat.append(this.element);
    this.scroll();
  }

  // Throws an `Error` for an error event.
  add(event) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) this.count = event.usage.completion_tokens;
    const delta = event.choices[0]?.delta ?? {};
    const thought = delta.reasoning_content ?? delta.reasoning;
    if (!thought && !delta.content && !delta.tool_calls) return;
    this.first ??= performance.now();
    if (thought) { if (!this.think.isConnected) this.bubble.before(this.think); this.think.textContent += thought; }
    if (delta.content) this.text += delta.content;
    for (const part of delta.tool_calls ?? []) this.call(part);
    this.bubble.textContent = this.text;
    this.bubble.hidden = !this.text;
    this.scroll();
  }

  call({ index = 0, id, function: part }) {
    const one = this.calls[index] ??= { id, type: "function", function: { name: "", arguments: "" }, element: this.figures.parentElement.insertBefore(h("div", { class: "bubble call" }), this.figures) };
    one.function.name += part?.name ?? "";
    one.function.arguments += part?.arguments ?? "";
    one.element.textContent = `${one.function.name}(${one.function.arguments})`;
  }

  end(isComplete) {
    if (this.first === null && !isComplete) { this.element.remove(); return; }
    if (this.first === null) {
      this.bubble.textContent = t("The model returned an empty response.");
      this.bubble.classList.add("muted");
      this.first = performance.now();
    }
    const end = performance.now();
    const rate = this.count > 1 && end > this.first ? `${((this.count - 1) / ((end - this.first) / 1000)).toFixed(1)} ${t("tokens/s")}` : null;
    this.figures.textContent = [`${t("first token")} ${seconds((this.first - this.began) / 1000)}`, rate, this.count ? `${this.count} ${t("tokens")}` : t("stopped")].filter(Boolean).join(" · ");
    this.scroll();
  }

  // Message for the next request; null if nothing arrived. Tool calls have no result, so they become text.
  get message() {
    if (this.first === null) return null;
    return { role: "assistant", content: [this.text, ...this.calls.map((one) => one.element.textContent)].filter(Boolean).join("\n") };
  }

  scroll() { this.chat.scrollTop = this.chat.scrollHeight; }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
