// Frame of the console: sign-in, navigation, theme and language. A page is a function that fills an element; it may
// return a function that stops it.

import { Api } from "./api.js";
import { field, h, note } from "./dom.js";
import { otherLanguage, switchLanguage, t } from "./i18n.js";
import { icon } from "./icons.js";
import { keys } from "./pages/keys.js";
import { logs } from "./pages/logs.js";
import { models } from "./pages/models.js";
import { playground } from "./pages/playground.js";
import { requests } from "./pages/requests.js";
import { settings } from "./pages/settings.js";
import { usage } from "./pages/usage.js";

const PAGES = [
  { path: "models", title: "Models", show: models, isForAdmins: true },
  { path: "playground", title: "Playground", show: playground },
  { path: "keys", title: "Keys", show: keys, isForAdmins: true },
  { path: "usage", title: "Usage", show: usage },
  { path: "requests", title: "Requests", show: requests, isForAdmins: true },
  { path: "logs", title: "Logs", show: logs, isForAdmins: true },
  { path: "settings", title: "Settings", show: settings, isForAdmins: true },
];
const KEY = "llm-api-server-key";

const root = document.getElementById("app");
let session = null;
let stop = () => {};

function theme() {
  return localStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

function switchTheme() {
  localStorage.setItem("theme", theme() === "dark" ? "light" : "dark");
  draw();
}

async function signIn(key) {
  const api = new Api(key);
  await api.get("/v1/models");
  let isAdmin = true;
  try { await api.get("/admin/api/status"); } catch (error) {
    if (error.status !== 403) throw error;
    isAdmin = false;
  }
  sessionStorage.setItem(KEY, key);
  session = { api, isAdmin };
}

function signOut() {
  sessionStorage.removeItem(KEY);
  session = null;
  draw();
}

function brand() {
  return h("div", { class: "brand" }, h("img", { src: "/console/icon.svg", alt: "" }), h("span", {}, "LLM API Server"));
}

function drawSignIn(message) {
  const input = h("input", { type: "password", autocomplete: "current-password", name: "key", required: true, placeholder: "sk-…" });
  const problem = h("div", {}, message ? note(message, true) : null);
  const button = h("button", { class: "primary", type: "submit" }, t("Sign in"));
  const form = h("form", {
    class: "stack",
    onsubmit: async (event) => {
      event.preventDefault();
      button.disabled = true;
      try {
        await signIn(input.value.trim());
        draw();
      } catch (error) {
        problem.replaceChildren(note(error.status === 401 ? t("This key is not valid.") : error.message, true));
        button.disabled = false;
      }
    },
  }, h("h1", {}, t("Sign in")),
  field(t("API key"), input, t("Use a key with the admin permission. Any other key shows its own usage and can try models.")), problem, button);
  root.replaceChildren(h("main", { class: "signin" }, brand(), h("div", { class: "panel" }, form), h("div", { class: "tools" }, tools())));
  input.focus();
}

function tools() {
  const isDark = theme() === "dark";
  const words = isDark ? t("Light") : t("Dark");
  return [
    h("button", { class: "plain small", onclick: () => { switchLanguage(); draw(); } }, otherLanguage()),
    h("button", { class: "plain small icon-only", title: words, "aria-label": words, onclick: switchTheme }, icon(isDark ? "sun" : "moon")),
  ];
}

function draw() {
  stop();
  stop = () => {};
  document.documentElement.dataset.theme = theme();
  if (session === null) {
    drawSignIn();
    return;
  }
  const pages = PAGES.filter((page) => session.isAdmin || !page.isForAdmins);
  const current = pages.find((page) => location.hash === `#${page.path}`) ?? pages[0];
  const links = pages.map((page) => h("a", { href: `#${page.path}`, "aria-current": page === current ? "page" : null }, icon(page.path), t(page.title)));
  const main = h("main", { id: "main" });
  const leave = h("button", { class: "plain small", "aria-label": t("Sign out"), title: t("Sign out"), onclick: signOut },
    icon("leave"), h("span", { class: "words" }, t("Sign out")));
  root.replaceChildren(h("div", { class: "shell" },
    h("div", { class: "side" }, brand(), h("nav", { "aria-label": "LLM API Server" }, links), h("div", { class: "tools" }, tools(), h("span", { class: "grow" }), leave)), main));
  document.title = `${t(current.title)} – LLM API Server`;
  links[pages.indexOf(current)].scrollIntoView({ block: "nearest", inline: "center" });
  stop = current.show(main, session) ?? (() => {});
}

addEventListener("hashchange", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

document.documentElement.dataset.theme = theme();
const kept = sessionStorage.getItem(KEY);
if (kept === null) drawSignIn();
else signIn(kept).then(draw, (error) => drawSignIn(error.status === 401 ? t("This key is not valid.") : error.message));
