// Charts over time: stacked bars or lines in SVG. The pointer and the arrow keys select a time, whose figures are shown;
// the label summarizes the chart.

import { h, panelHead, svg } from "./dom.js";
import { short } from "./format.js";

const HEIGHT = 100;

// `series`: [{title, kind (a CSS class), values}] with one value per text in `times`; null: no value.
export function chart({ title, times, series, isLines = false, show = short, summary }) {
  const totals = times.map((_, i) => (isLines ? Math.max(...series.map(({ values }) => values[i] ?? 0)) : sum(series.map(({ values }) => values[i] ?? 0))));
  const most = niceTop(Math.max(...totals, 0), !isLines);
  const readout = h("span", { class: "muted small", "aria-live": "polite" });
  const slots = times.map((_, i) => svg("rect", { class: "slot", x: i, y: 0, width: 1, height: HEIGHT }));
  const marks = isLines ? series.flatMap((one) => lines(one, most)) : times.flatMap((_, i) => stack(series, i, most));
  const rules = [0, 0.5, 1].map((part) => svg("line", { class: "rule", x1: 0, x2: times.length, y1: HEIGHT * part, y2: HEIGHT * part }));
  const picture = svg("svg", { viewBox: `0 0 ${times.length} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" }, rules, slots, marks);
  const plot = h("div", { class: "plot", role: "img", tabindex: 0, "aria-label": `${title}: ${summary}` }, picture);
  let at = null;
  const point = (to) => {
    slots[at]?.classList.remove("on");
    at = to === null ? null : Math.max(0, Math.min(times.length - 1, to));
    slots[at]?.classList.add("on");
    readout.textContent = at === null ? "" : [times[at], ...series.map((one) => `${one.title} ${one.values[at] === null ? "–" : show(one.values[at])}`)].join(" · ");
  };
  plot.addEventListener("pointermove", (event) => {
    const { left, width } = plot.getBoundingClientRect();
    point(Math.floor(((event.clientX - left) / width) * times.length));
  });
  plot.addEventListener("pointerleave", () => point(null));
  plot.addEventListener("blur", () => point(null));
  plot.addEventListener("keydown", ({ key }) => {
    if (key === "ArrowLeft") point((at ?? times.length) - 1);
    if (key === "ArrowRight") point((at ?? -1) + 1);
  });
  const legend = h("div", { class: "legend" }, series.map((one) => h("span", {}, swatch(one.kind), one.title)));
  return h("section", { class: "panel" }, panelHead(title, readout),
    h("div", { class: "chart" },
      h("div", { class: "scale" }, [most, most / 2, 0].map((value) => h("span", {}, show(value)))), plot,
      h("div", { class: "times" }, [times[0], times[Math.floor(times.length / 2)], times.at(-1)].map((one) => h("span", {}, one)))),
    legend);
}

export function swatch(kind) {
  return svg("svg", { viewBox: "0 0 1 1", "aria-hidden": "true" }, svg("rect", { width: 1, height: 1, class: kind }));
}

function stack(series, i, most) {
  let top = HEIGHT;
  return series.map(({ kind, values }) => {
    const height = (HEIGHT * (values[i] ?? 0)) / most;
    top -= height;
    return svg("rect", { class: kind, x: i + 0.14, width: 0.72, y: top, height });
  });
}

// Adjacent points are joined; a single point is a dot.
function lines({ kind, values }, most) {
  const runs = [];
  values.forEach((value, i) => {
    if (value === null) return;
    if (i === 0 || values[i - 1] === null) runs.push([]);
    runs.at(-1).push(`${i + 0.5},${HEIGHT - (HEIGHT * value) / most}`);
  });
  const stroke = kind.replace("fill", "line");
  return runs.map((run) => (run.length > 1
    ? svg("polyline", { class: stroke, points: run.join(" ") })
    : svg("path", { class: `${stroke} spot`, d: `M${run[0]}h0` })));
}

// Smallest round number that is not less than `value`; for whole numbers, one whose half is whole.
function niceTop(value, isWhole) {
  if (isWhole && value <= 2) return 2;
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 6, 8, 10].find((step) => step * power >= value) * power;
}

function sum(values) {
  return values.reduce((all, one) => all + one, 0);
}
