// Run `work` at an interval until the page is left. A failure is shown until the next success.

import { note } from "../dom.js";

export function every(milliseconds, problem, work) {
  let timer = null;
  let isStopped = false;
  async function step() {
    try {
      await work();
      if (!isStopped) problem.replaceChildren();
    } catch (error) {
      if (!isStopped) problem.replaceChildren(note(error.message, true));
    }
    if (!isStopped) timer = setTimeout(step, document.hidden ? 4 * milliseconds : milliseconds);
  }
  step();
  return () => { isStopped = true; clearTimeout(timer); };
}
