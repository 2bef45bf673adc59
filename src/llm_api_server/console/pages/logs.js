// The ends of the logs: gateway, manager, and each engine.

import { nameInPath } from "../api.js";
import { check, h, note, pageHead } from "../dom.js";
import { t } from "../i18n.js";
import { every } from "./every.js";

export function logs(main, { api }) {
  const problem = h("div", {});
  const select = h("select", { "aria-label": t("Log") });
  const text = h("pre", { class: "box", tabindex: 0, "aria-label": t("Log") });
  let follows = true;
  main.replaceChildren(pageHead(t("Logs"), select, check(t("Follow"), true, (on) => { follows = on; })), problem, text);
  let stop = () => {};
  api.get("/admin/api/logs").then(({ data }) => {
    select.replaceChildren(...data.map((log) => h("option", { value: log.name }, log.name)));
    stop = every(2000, problem, async () => {
      if (!follows || !select.value) return;
      const found = await api.text(`/admin/api/logs/${nameInPath(select.value)}?lines=300`);
      if (found === text.textContent) return;
      text.textContent = found;
      text.scrollTop = text.scrollHeight;
    });
  }, (error) => problem.replaceChildren(note(error.message, true)));
  return () => stop();
}
