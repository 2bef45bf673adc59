// Client of the server's API with the key of the session. Errors carry the server's message.

import { t } from "./i18n.js";

export class Failure extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export class Api {
  constructor(key) { this.key = key; }

  async send(method, path, body, options = {}) {
    const headers = { authorization: `Bearer ${this.key}` };
    if (body !== undefined) headers["content-type"] = "application/json";
    let response;
    try {
      response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), ...options });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure(t("The server does not respond."), 0, "unreachable");
    }
    if (response.ok) return response;
    let problem = {};
    try { problem = (await response.json()).error ?? {}; } catch { /* not JSON: the page of a proxy */ }
    throw new Failure(problem.message ?? `${response.status} ${response.statusText}`, response.status, problem.code);
  }

  async get(path) { return (await this.send("GET", path)).json(); }
  async text(path) { return (await this.send("GET", path)).text(); }
  async find(path, otherwise) {
    try { return await this.text(path); } catch { return otherwise; }
  }
  async post(path, body) { return (await this.send("POST", path, body)).json(); }
  async patch(path, body) { return (await this.send("PATCH", path, body)).json(); }
  async remove(path) { return (await this.send("DELETE", path)).json(); }

  // Call `onEvent` with the content of each server-sent event; return at the end of the stream.
  async events(method, path, body, onEvent, signal) {
    const response = await this.send(method, path, body, { signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data: ") && line !== "data: [DONE]") onEvent(JSON.parse(line.slice(6)));
      }
    }
  }
}

export function nameInPath(name) {
  return name.split("/").map(encodeURIComponent).join("/");
}
