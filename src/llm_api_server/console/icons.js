// Line drawings of 24 by 24 for navigation and buttons, hidden from screen readers since a text stands beside each.

import { svg } from "./dom.js";

const PATHS = {
  models: "M12 3 4 7.5v9L12 21l8-4.5v-9zM4 7.5l8 4.5 8-4.5M12 12v9",
  playground: "M21 12a8 8 0 0 1-11.6 7.1L4 20.5l1.4-5A8 8 0 1 1 21 12z",
  keys: "M14.5 9.5a4.5 4.5 0 1 1-4-4.5 4.5 4.5 0 0 1 4 4.5zM13 12.5l7 7M17 16.5l2-2",
  usage: "M4 20V10M10 20V4M16 20v-7M21 20H3",
  requests: "M4 7h12M13 4l3 3-3 3M20 17H8M11 14l-3 3 3 3",
  logs: "M5 4h14v16H5zM9 9h6M9 13h6M9 17h3",
  settings: "M4 7h9M17 7h3M4 17h3M11 17h9M15 5v4M9 15v4",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 3v1.5M12 19.5V21M3 12h1.5M19.5 12H21M5.6 5.6l1 1M17.4 17.4l1 1M5.6 18.4l1-1M17.4 6.6l1-1",
  moon: "M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5z",
  leave: "M14 4h5v16h-5M10 8l-4 4 4 4M6 12h9",
  pin: "M9 4h6l-1 6 3 3v2H7v-2l3-3zM12 15v5",
  close: "M6 6l12 12M18 6 6 18",
  plus: "M12 5v14M5 12h14",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  pause: "M9 6v12M15 6v12",
  play: "M8 5.5v13l10-6.5z",
  picture: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M15.5 9h.01",
  download: "M12 4v11M7.5 11 12 15.5 16.5 11M5 20h14",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
};

export function icon(name) {
  return svg("svg", { class: "icon", viewBox: "0 0 24 24", "aria-hidden": "true" }, svg("path", { d: PATHS[name] }));
}
