// Texts are English in the code; `zh.js` translates them. A text without translation is shown in English.

import { CHINESE } from "./zh.js";

let language = localStorage.getItem("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
document.documentElement.lang = language;

export function t(text) {
  return language === "zh" ? CHINESE[text] ?? text : text;
}

export function otherLanguage() {
  return language === "zh" ? "English" : "中文";
}

export function switchLanguage() {
  language = language === "zh" ? "en" : "zh";
  localStorage.setItem("language", language);
  document.documentElement.lang = language;
}
