// The whole story in a browser: sign in, get a model, load it, chat, make a key, use it up, see it, take all back.
// Needs URL, KEY, SOURCE and OUT (where pictures go) in the environment, and Debian's Chromium.

import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import OpenAI from "openai";
import { chromium } from "playwright-core";

const { URL: base, KEY: key, SOURCE: source, OUT: out } = process.env;
const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const MODEL = "starter";
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
  page.setDefaultTimeout(90_000);
  page.on("pageerror", (error) => problems.push(`page: ${error.message}`));
  page.on("console", (message) => { if (message.type() === "error" && !/40[13] /.test(message.text())) problems.push(`console: ${message.text()}`); });
  return page;
}

async function signIn(page, secret = key) {
  await page.goto(`${base}/console`);
  await page.getByLabel("Your key").fill(secret);
  await page.getByRole("button", { name: "Sign in" }).click();
  await page.getByRole("navigation").waitFor();
}

async function go(page, name) {
  await page.getByRole("navigation").getByRole("link", { name }).click();
  await page.getByRole("heading", { level: 1, name }).waitFor();
}

const page = await open();

// A wrong key is refused, the right one signs in.
await page.goto(`${base}/console`);
await page.getByLabel("Your key").fill("sk-wrong");
await page.getByRole("button", { name: "Sign in" }).click();
await page.getByText("This key is not valid.").waitFor();
await signIn(page);

// A model is downloaded and loaded, and its phases are shown.
await page.getByText("No models yet").waitFor();
await page.getByLabel("Source").fill(source);
await page.getByLabel("Name (optional)").fill(MODEL);
await page.getByRole("button", { name: "Download" }).click();
await page.getByText(/^done/).waitFor();
await page.getByRole("button", { name: "Load", exact: true }).click();
await page.locator(".tag.ok", { hasText: "ready" }).waitFor();
await page.getByRole("button", { name: "Details" }).click();
await page.getByRole("dialog").getByText("It is ready").waitFor();
await page.getByRole("button", { name: "Close" }).click();

// A chat is streamed, with its figures.
await go(page, "Playground");
await page.getByLabel("Most tokens").fill("24");
await page.getByLabel("Message").fill("Say hello.");
await page.getByRole("button", { name: "Send" }).click();
await page.getByText(/first token .* tokens\/s/).waitFor();
check((await page.locator(".bubble").last().textContent()).length > 2, "the answer is shown");

// A key with a limit is made, and used up by the official client.
await go(page, "Keys");
await page.getByLabel("Name", { exact: true }).fill("limited");
await page.getByLabel("Requests per minute").fill("2");
await page.getByLabel("Permissions").fill("chat, completions");
await page.getByRole("button", { name: "Create" }).click();
const secret = await page.locator("#new-secret").textContent();
const client = new OpenAI({ baseURL: `${base}/v1`, apiKey: secret, maxRetries: 0 });
const ask = () => client.completions.create({ model: MODEL, prompt: "Hi", max_tokens: 3 });
await ask();
await ask();
const refusal = await ask().catch((error) => error);
check(refusal.status === 429, `the limit holds: ${refusal.status}`);

// It is seen in the usage, among the requests and in the metrics.
await go(page, "Usage");
const row = page.getByRole("row", { name: /limited/ });
for (let tries = 0; (await row.count()) === 0 && tries < 60; tries += 1) {
  await page.waitForTimeout(500);
  await page.reload();
}
check((await row.textContent()).includes("2"), "the usage has both requests");
await go(page, "Requests");
await page.getByRole("row", { name: /limited/ }).first().waitFor();
const metrics = await (await fetch(`${base}/metrics`, { headers: { authorization: `Bearer ${key}` } })).text();
check(/limit_hits_total\{key="limited",limit="requests_per_minute"\} 1\.0/.test(metrics), "the metrics have the refusal");

// Who has another key sees its own usage and can try models, and nothing else.
const guest = await open();
await signIn(guest, secret);
check((await guest.getByRole("navigation").getByRole("link").allTextContents()).join() === "Playground,Usage", "a guest's pages");
await go(guest, "Usage");
await guest.getByText("Requests").first().waitFor();

// Logs and settings.
await go(page, "Logs");
await page.getByLabel("Log", { exact: true }).first().selectOption("manager");
await page.locator("pre", { hasText: `model ${MODEL} ready` }).waitFor();
await go(page, "Settings");
await page.getByRole("button", { name: "What would change?" }).click();
await page.getByText("Nothing changes.").waitFor();

// Every page, light and dark, wide and narrow: no control without a name, no serious fault.
for (const [theme, width] of [["light", 1280], ["dark", 1280], ["light", 390], ["dark", 390]]) {
  const other = await open({ colorScheme: theme, viewport: { width, height: 860 }, bypassCSP: true });
  await signIn(other);
  for (const name of PAGES) {
    await other.goto(`${base}/console#${name}`);
    await other.getByRole("heading", { level: 1 }).waitFor();
    await other.waitForTimeout(700);
    await other.screenshot({ path: `${out}/${name}-${theme}-${width}.png`, fullPage: width === 1280 });
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
await page.getByRole("button", { name: "中文" }).click();
await page.getByRole("heading", { level: 1, name: "设置" }).waitFor();
await page.getByRole("button", { name: "English" }).click();

// The key is revoked, the model unloaded.
await go(page, "Keys");
await page.getByRole("row", { name: /limited/ }).getByRole("button", { name: "Revoke" }).click();
await page.getByRole("dialog").getByRole("button", { name: "Yes" }).click();
await page.getByRole("row", { name: /limited.*revoked/ }).waitFor();
let late = {};
for (let tries = 0; late.status !== 401 && tries < 20; tries += 1) {
  late = await ask().catch((error) => error);
  await page.waitForTimeout(250); // workers hear of it within a quarter of a second
}
check(late.status === 401, `a revoked key is refused: ${late.status}`);
await go(page, "Models");
await page.getByRole("button", { name: "Unload" }).click();
await page.getByRole("dialog").getByRole("button", { name: "Unload" }).click();
await page.locator(".tag", { hasText: "stopped" }).waitFor();

// What the first visit costs.
const first = await open();
const sizes = [];
first.on("response", async (answer) => sizes.push((await answer.body()).length));
await first.goto(`${base}/console`, { waitUntil: "networkidle" });
console.log(JSON.stringify({ files: sizes.length, bytes: sizes.reduce((sum, one) => sum + one, 0) }));

await browser.close();
check(problems.length === 0, problems.join("\n"));
