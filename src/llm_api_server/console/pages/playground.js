// A chat with a model, streamed: text, pictures, tools; what the first token and the rest took.

import { field, h, note, pageHead } from "../dom.js";
import { seconds } from "../format.js";
import { t } from "../i18n.js";

export function playground(main, { api }) {
  const problem = h("div", {});
  const select = h("select", { name: "model" });
  const system = h("textarea", { rows: 2, name: "system" });
  const temperature = h("input", { type: "number", min: 0, max: 2, step: 0.1, value: 0.7, name: "temperature" });
  const most = h("input", { type: "number", min: 1, value: 512, name: "max_tokens" });
  const tools = h("textarea", { rows: 3, name: "tools", class: "mono", placeholder: '[{"type": "function", "function": {"name": "…"}}]' });
  const chat = h("div", { class: "chat", role: "log", "aria-live": "polite", tabindex: 0, "aria-label": t("Playground") }, h("p", { class: "muted" }, t("Ask something.")));
  const input = h("textarea", { rows: 3, name: "message", placeholder: t("Enter sends, Shift+Enter begins a line.") });
  const picture = h("input", { type: "file", accept: "image/*", name: "picture" });
  const figures = h("span", { class: "muted small", role: "status" });
  const send = h("button", { class: "primary", type: "submit" }, t("Send"));
  let messages = [];
  let running = null;

  function body() {
    const start = system.value.trim() ? [{ role: "system", content: system.value.trim() }] : [];
    const found = { model: select.value, messages: [...start, ...messages], max_tokens: Number(most.value), temperature: Number(temperature.value) };
    if (tools.value.trim()) found.tools = JSON.parse(tools.value);
    return found;
  }

  async function ask() {
    const answer = { role: "assistant", content: "" };
    const think = h("div", { class: "bubble think" });
    const bubble = h("div", { class: "bubble" });
    chat.append(bubble);
    running = new AbortController();
    send.textContent = t("Stop");
    const began = performance.now();
    let first = null;
    let calls = "";
    let count = 0;
    figures.textContent = "…";
    try {
      const wanted = { ...body(), stream: true, stream_options: { include_usage: true } };
      await api.events("POST", "/v1/chat/completions", wanted, (event) => {
        if (event.error) throw new Error(event.error.message);
        if (event.usage) count = event.usage.completion_tokens;
        const delta = event.choices[0]?.delta ?? {};
        const thought = delta.reasoning_content ?? delta.reasoning;
        if (!thought && !delta.content && !delta.tool_calls) return;
        first ??= performance.now();
        if (thought) { if (!think.isConnected) bubble.before(think); think.textContent += thought; }
        if (delta.content) answer.content += delta.content;
        for (const call of delta.tool_calls ?? []) calls += (call.function?.name ? `\n${call.function.name} ` : "") + (call.function?.arguments ?? "");
        bubble.textContent = answer.content + calls;
        chat.scrollTop = chat.scrollHeight;
      }, running.signal);
    } catch (error) {
      if (error.name !== "AbortError") { problem.replaceChildren(note(t("Failed: ") + error.message, true)); if (!bubble.textContent) bubble.remove(); }
    }
    const end = performance.now();
    if (first !== null) {
      const rate = count > 1 && end > first ? ` · ${((count - 1) / ((end - first) / 1000)).toFixed(1)} ${t("tokens/s")}` : "";
      figures.textContent = `${t("first token")} ${seconds((first - began) / 1000)}${rate} · ${count} ${t("Tokens")}`;
      messages.push(answer);
    } else figures.textContent = "";
    running = null;
    send.textContent = t("Send");
  }

  async function onSend(event) {
    event.preventDefault();
    if (running) { running.abort(); return; }
    const text = input.value.trim();
    if (!text) return;
    problem.replaceChildren();
    const image = picture.files[0] ? await dataUrl(picture.files[0]) : null;
    if (messages.length === 0) chat.replaceChildren();
    messages.push({ role: "user", content: image ? [{ type: "text", text }, { type: "image_url", image_url: { url: image } }] : text });
    chat.append(h("div", { class: "bubble user" }, image ? h("img", { src: image, alt: picture.files[0].name }) : null, text));
    input.value = "";
    picture.value = "";
    await ask();
    input.focus();
  }

  async function copy(make) {
    try {
      await navigator.clipboard.writeText(make(body()));
      figures.textContent = t("Copied.");
    } catch (error) { problem.replaceChildren(note(error.message, true)); }
  }

  const form = h("form", { onsubmit: onSend }, field(t("Message"), input), h("div", { class: "row" }, field(t("Picture"), picture), h("span", { class: "grow" }), figures, send));
  input.addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); } });
  const reset = h("button", { onclick: () => { running?.abort(); messages = []; chat.replaceChildren(h("p", { class: "muted" }, t("Ask something."))); figures.textContent = ""; } }, t("New chat"));
  main.replaceChildren(pageHead(t("Playground"), h("button", { onclick: () => copy(asCurl) }, t("as curl")), h("button", { onclick: () => copy(asPython) }, t("as Python")), reset), problem,
    h("div", { class: "panel" }, h("div", { class: "grid" }, field(t("Model"), select), field(t("Temperature"), temperature), field(t("Most tokens"), most)),
      h("details", {}, h("summary", {}, t("Parameters")), field(t("System prompt"), system), field(t("Tools (JSON)"), tools))),
    h("div", { class: "panel" }, chat, form));
  api.get("/v1/models").then(({ data }) => {
    const able = data.filter((model) => !model.tasks || model.tasks.includes("generate"));
    select.replaceChildren(...able.map((model) => h("option", { value: model.id }, model.id)));
    const ready = able.find((model) => model.status === "ready");
    if (ready) select.value = ready.id;
  }, (error) => problem.replaceChildren(note(error.message, true)));
  return () => running?.abort();
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function asCurl(body) {
  const text = JSON.stringify(body).replaceAll("'", "'\\''");
  return `curl ${location.origin}/v1/chat/completions -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" -d '${text}'`;
}

function asPython(body) {
  return `import os\n\nfrom openai import OpenAI\n\nclient = OpenAI(base_url="${location.origin}/v1", api_key=os.environ["KEY"])\nanswer = client.chat.completions.create(**${python(body)})\nprint(answer.choices[0].message.content)\n`;
}

function python(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([key, one]) => `${JSON.stringify(key)}: ${python(one)}`).join(", ")}}`;
  return JSON.stringify(value);
}
