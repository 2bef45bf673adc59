// Every page in a browser: sign in, download, load and pin a model, chat, create, change and exhaust a key, read usage
// and logs, and remove everything. Needs URL, KEY, SOURCE and OUT (folder of the screenshots) in the environment, and
// Debian's Chromium. The configuration has a model `other`, which fits only if the first one is evicted.

import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import OpenAI from "openai";
import { chromium } from "playwright-core";

const { URL: base, KEY: key, SOURCE: source, OUT: out } = process.env;
const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const MODEL = "starter";
const OTHER = "other";
const PAGES = ["models", "playground", "keys", "usage", "requests", "logs", "settings"];
const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
const problems = [];

function check(is, what) {
  if (!is) throw new Error(what);
}

const browser = await chromium.launch({ executablePath: "/usr/bin/chromium", args: FLAGS });

async function open(options = {}) {
  // axe is put into the page by the test, which the page's own policy forbids.
  const context = await browser.newContext({ viewport: { width: 1280, height: 860 }, locale: "en-US", colorScheme: "light", ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(60_000);
  page.on("pageerror", (error) => problems.push(`page: ${error.message}`));
  page.on("console", (message) => { if (message.type() === "error" && !/40[0134] |409 /.test(message.text())) problems.push(`console: ${message.text()}`); });
  return page;
}

async function signIn(page, secret = key) {
  await page.goto(`${base}/console`);
  await page.getByLabel("API key").fill(secret);
  await page.getByRole("button", { name: "Sign in" }).click();
  await page.getByRole("navigation").waitFor();
}

async function go(page, name) {
  await page.getByRole("navigation").getByRole("link", { name }).click();
  await page.getByRole("heading", { level: 1, name }).waitFor();
}

const page = await open();
const rowOf = (name) => page.locator(".model", { has: page.locator(".name", { hasText: new RegExp(`^${name}$`) }) });
const press = (name, row = page) => row.getByRole("button", { name, exact: true }).click();
const answer = (name) => page.getByRole("dialog").getByRole("button", { name, exact: true }).click();

// An invalid key is refused, the right one signs in.
await page.goto(`${base}/console`);
await page.screenshot({ path: `${out}/signin-light-1280.png` });
await page.getByLabel("API key").fill("sk-wrong");
await page.getByRole("button", { name: "Sign in" }).click();
await page.getByText("This key is not valid.").waitFor();
await signIn(page);

// A model is downloaded and loaded, and its details are shown.
await page.getByLabel("Source").fill(source);
await page.getByLabel("Name (optional)").fill(MODEL);
await press("Download");
await page.locator(".downloads .tag.ok", { hasText: "done" }).waitFor();
await press("Load", rowOf(MODEL));
await rowOf(MODEL).locator(".phases").waitFor();
await page.screenshot({ path: `${out}/load-light-1280.png` });
await rowOf(MODEL).locator(".tag", { hasText: "ready" }).waitFor();
await press("Details", rowOf(MODEL));
await page.getByRole("dialog").getByText("It is ready").waitFor();
await page.screenshot({ path: `${out}/details-light-1280.png` });
await page.keyboard.press("Escape");

// The pointer on Load previews the eviction; a pinned model is never evicted.
await page.getByRole("button", { name: "Load", exact: true }).hover();
await page.getByText(`after evicting ${MODEL}`).waitFor();
await page.screenshot({ path: `${out}/evict-light-1280.png` });
await press("Load", rowOf(OTHER));
await page.getByRole("dialog").getByText(`unloads: ${MODEL}`).waitFor();
await answer("Cancel");
await press("Pin", rowOf(MODEL));
await rowOf(MODEL).locator(".tag", { hasText: "pinned" }).waitFor();
await press("Load", rowOf(OTHER));
await page.getByRole("alert").getByText(`pinned models (${MODEL})`).waitFor();
await press("Unpin", rowOf(MODEL));
await rowOf(MODEL).locator(".tag", { hasText: "pinned" }).waitFor({ state: "detached" });
await press("Load", rowOf(OTHER));
await answer("Load");
await rowOf(OTHER).locator(".tag", { hasText: "ready" }).waitFor();
await rowOf(MODEL).locator(".tag", { hasText: "stopped" }).waitFor();
await press("Load", rowOf(MODEL));
await answer("Load");
await rowOf(MODEL).locator(".tag", { hasText: "ready" }).waitFor();
await press("Pin", rowOf(MODEL));

// A chat is streamed with its timings; tools that are not JSON are an error.
await go(page, "Playground");
await page.getByLabel("Max tokens").fill("40");
await page.getByLabel("Message").fill("Say hello.");
await press("Send");
await page.getByText(/first token .* tokens\/s/).waitFor();
check((await page.locator(".bubble").last().textContent()).length > 2, "the response is shown");
await page.screenshot({ path: `${out}/chat-light-1280.png` });
await page.getByText("More parameters").click();
await page.getByLabel("Tools (JSON)").fill("[");
await page.getByLabel("Message").fill("Once more.");
await press("Send");
await page.getByRole("alert").getByText("Tools (JSON)").waitFor();
await page.getByLabel("Tools (JSON)").fill("");

// A key is made, changed, and used up by the official client.
await go(page, "Keys");
await press("New key");
const dialog = page.getByRole("dialog");
await dialog.getByLabel("Name", { exact: true }).fill("limited");
await dialog.getByLabel("Requests per minute").fill("100");
for (const name of ["all", "chat", "completions"]) await dialog.getByLabel(name, { exact: true }).click();
await page.screenshot({ path: `${out}/key-light-1280.png` });
await press("Create");
const secret = await page.locator("#new-secret").textContent();
await press("Edit: limited");
check(await dialog.getByLabel("chat", { exact: true }).isChecked() && !(await dialog.getByLabel("all", { exact: true }).isChecked()), "the form has what the key has");
await dialog.getByLabel("Requests per minute").fill("2");
await dialog.getByLabel("Note").fill("for the story");
await dialog.getByLabel("Tokens per month").fill("1000000");
await dialog.getByLabel("Expires").fill("nonsense");
await press("Save");
await dialog.getByRole("alert").getByText("expires_at").waitFor();
await dialog.getByLabel("Expires").fill("30d");
await press("Save");
await page.getByRole("row", { name: /limited.*for the story.*2 req\/min, 1M tok\/month/ }).waitFor();
const client = new OpenAI({ baseURL: `${base}/v1`, apiKey: secret, maxRetries: 0 });
const ask = () => client.completions.create({ model: MODEL, prompt: "Hi", max_tokens: 3 });
let late = {};
await ask();
await ask();
const refusal = await ask().catch((error) => error);
check(refusal.status === 429, `the limit holds: ${refusal.status}`);

// The requests appear in the usage, in the list and in the metrics.
await go(page, "Usage");
const row = page.getByRole("row", { name: /limited/ });
for (let tries = 0; (await row.count()) === 0 && tries < 60; tries += 1) {
  await page.waitForTimeout(500);
  await page.reload();
}
check((await row.textContent()).includes("2"), "the usage has both requests");
await page.getByLabel("Key", { exact: true }).selectOption({ label: "limited" });
await page.getByRole("row", { name: /all/ }).waitFor({ state: "detached" });
await page.getByRole("img", { name: /^Requests: 2, peak at/ }).waitFor();
await page.getByRole("img", { name: /^Mean latency: longest/ }).focus();
await page.keyboard.press("ArrowLeft");
await page.getByText(/First token .* · Full response/).waitFor();
await go(page, "Requests");
await page.getByRole("row", { name: /limited/ }).first().waitFor();
await page.getByLabel("Filter").fill("no such thing");
await page.getByText("No matching requests.").waitFor();
const metrics = await (await fetch(`${base}/metrics`, { headers: { authorization: `Bearer ${key}` } })).text();
check(/limit_hits_total\{key="limited",limit="requests_per_minute"\} 1\.0/.test(metrics), "the metrics have the refusal");

// Requests in flight are shown.
const admin = new OpenAI({ baseURL: `${base}/v1`, apiKey: key, maxRetries: 0 });
const long = () => admin.completions.create({ model: MODEL, prompt: "Once upon a time", max_tokens: 4000, stream: true, ignore_eos: true });
const streams = [await long(), await long()];
await page.getByRole("row", { name: /completions generating/ }).first().waitFor();
await page.getByRole("row", { name: /tokens\/s|\d+\.\d$/ }).first().waitFor();
await page.screenshot({ path: `${out}/live-light-1280.png` });
for (const stream of streams) stream.controller.abort();
await page.getByText("No requests in flight.").waitFor();

// A key without the admin permission shows its own usage and the playground only.
const guest = await open();
await signIn(guest, secret);
check((await guest.getByRole("navigation").getByRole("link").allTextContents()).join() === "Playground,Usage", "a guest's pages");
await go(guest, "Usage");
await guest.getByText("Requests").first().waitFor();

// Logs are shown, searched and paused; settings show no changes.
await go(page, "Logs");
await page.getByRole("combobox", { name: "Log" }).selectOption("manager");
await page.locator(".log", { hasText: `model ${MODEL} ready` }).waitFor();
await page.getByLabel("Search").fill("READY AFTER");
await page.locator(".log mark", { hasText: "ready after" }).first().waitFor();
check((await page.locator(".log > div").allTextContents()).every((line) => line.includes("ready after")), "only what fits is shown");
await page.getByLabel("Level").selectOption({ label: "Errors only" });
await page.getByText("No matching lines.").waitFor();
await page.getByLabel("Level").selectOption({ label: "All levels" });
await press("Pause");
await page.getByRole("button", { name: "Follow" }).waitFor();
await go(page, "Settings");
await press("Preview changes");
await page.getByText("No changes.").waitFor();

// Every page, light and dark, wide and narrow: axe finds no serious fault.
for (const [theme, width] of [["light", 1280], ["dark", 1280], ["light", 390], ["dark", 390]]) {
  const other = await open({ colorScheme: theme, viewport: { width, height: 860 }, bypassCSP: true });
  await signIn(other);
  for (const name of PAGES) {
    await other.goto(`${base}/console#${name}`);
    await other.getByRole("heading", { level: 1 }).waitFor();
    await other.waitForTimeout(900);
    await other.screenshot({ path: `${out}/${name}-${theme}-${width}.png`, fullPage: true });
    check(await other.evaluate(() => document.documentElement.scrollWidth <= innerWidth), `${name} is not wider than ${width}`);
    await other.evaluate(AXE);
    const { violations } = await other.evaluate(() => globalThis.axe.run());
    for (const one of violations.filter(({ impact }) => ["serious", "critical"].includes(impact))) {
      problems.push(`axe, ${name} ${theme} ${width}: ${one.id}: ${one.help}: ${one.nodes.map(({ html }) => html).join(" ").slice(0, 300)}`);
    }
  }
  await other.context().close();
}

// In Chinese.
await press("中文");
await page.getByRole("heading", { level: 1, name: "设置" }).waitFor();
for (const name of PAGES) {
  await page.goto(`${base}/console#${name}`);
  await page.waitForTimeout(900);
  await page.screenshot({ path: `${out}/${name}-zh-1280.png`, fullPage: true });
}
await press("English");

// The key is revoked, the model unloaded and removed.
await go(page, "Keys");
await press("Revoke: limited");
await answer("Revoke");
await page.getByRole("row", { name: /limited.*revoked/ }).waitFor();
for (let tries = 0; late.status !== 401 && tries < 20; tries += 1) {
  late = await ask().catch((error) => error);
  await page.waitForTimeout(250); // workers follow within a quarter of a second
}
check(late.status === 401, `a revoked key is refused: ${late.status}`);
await go(page, "Models");
await press("Unload", rowOf(MODEL));
await answer("Unload");
await rowOf(MODEL).locator(".tag", { hasText: "stopped" }).waitFor();
await press("Details", rowOf(MODEL));
await answer("Remove …");
await answer("Remove");
await rowOf(MODEL).waitFor({ state: "detached" });
await press("Details", rowOf(OTHER));
await answer("Remove …");
await answer("Remove");
await page.getByRole("alert").getByText("keep_files=true").waitFor();
await press("Details", rowOf(OTHER));
await answer("Remove …");
await page.getByRole("dialog").getByLabel("Keep its files").click();
await answer("Remove");
await page.getByText("No models yet").waitFor();

// Files and bytes of the first visit.
const first = await open();
const sizes = [];
first.on("response", async (answer) => sizes.push((await answer.body()).length));
await first.goto(`${base}/console`, { waitUntil: "networkidle" });
console.log(JSON.stringify({ files: sizes.length, bytes: sizes.reduce((sum, one) => sum + one, 0) }));

await browser.close();
check(problems.length === 0, problems.join("\n"));
