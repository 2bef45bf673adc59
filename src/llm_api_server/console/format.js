// Numbers and times as text.

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let size = value;
  let unit = 0;
  while (size >= 1000 && unit < units.length - 1) { size /= 1000; unit += 1; }
  return `${size >= 100 || unit === 0 ? Math.round(size) : size.toFixed(1)} ${units[unit]}`;
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 120) return `${value.toFixed(1)} s`;
  return value < 7200 ? `${Math.round(value / 60)} min` : `${(value / 3600).toFixed(1)} h`;
}

export function number(value) {
  return value === null || value === undefined ? "–" : value.toLocaleString(document.documentElement.lang);
}

// 12,300 as 12.3K, for scales.
export function short(value) {
  return value.toLocaleString("en", { notation: "compact", maximumFractionDigits: 1 });
}

export function time(unix) {
  if (!unix) return "–";
  const options = { year: "numeric", month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" };
  return new Date(unix * 1000).toLocaleString(document.documentElement.lang, options);
}

export function day(unix) {
  return new Date(unix * 1000).toLocaleDateString(document.documentElement.lang, { year: "numeric", month: "short", day: "numeric" });
}

export function clock(unix) {
  const at = new Date(unix * 1000);
  const day = at.toDateString() === new Date().toDateString() ? {} : { month: "short", day: "numeric" };
  return at.toLocaleString(document.documentElement.lang, { ...day, hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
}
