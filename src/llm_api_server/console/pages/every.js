// Does `work` now and again until the page is left; a failure is shown and the next try goes on.

import { note } from "../dom.js";

export function every(milliseconds, problem, work) {
  let timer = null;
  let isOver = false;
  async function step() {
    try {
      await work();
      if (!isOver) problem.replaceChildren();
    } catch (error) {
      if (!isOver) problem.replaceChildren(note(error.message, true));
    }
    if (!isOver) timer = setTimeout(step, document.hidden ? 4 * milliseconds : milliseconds);
  }
  step();
  return () => { isOver = true; clearTimeout(timer); };
}
