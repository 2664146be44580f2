// The same page from `idefics serve`, with the small random model of fixtures/tiny: its words mean nothing.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { createServer } from "node:net";
import { test } from "node:test";
import { setTimeout as wait } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { lastAnswer, openBrowser, pick, pictures, say, screenshot } from "./browser.mjs";

const binary = process.env.IDEFICS;

function freePort() {
  return new Promise((resolve) => {
    const server = createServer().listen(0, "127.0.0.1", () => {
      const { port } = server.address();
      server.close(() => resolve(port));
    });
  });
}

async function serve() {
  const port = await freePort();
  const model = fileURLToPath(new URL("../../fixtures/tiny", import.meta.url));
  const child = spawn(binary, ["serve", "--model", model, "--port", String(port)], { stdio: ["ignore", "ignore", "pipe"] });
  let said = "";
  child.stderr.on("data", (data) => (said += data));
  const url = `http://127.0.0.1:${port}/`;
  for (let attempt = 0; attempt < 1200; attempt += 1) {
    if (child.exitCode !== null) throw new Error(`the server ended: ${said}`);
    const isReady = await fetch(`${url}health`).then((response) => response.ok, () => false);
    if (isReady) return { url, child };
    await wait(50);
  }
  child.kill();
  throw new Error(`the server does not get ready: ${said}`);
}

test("the page talks with the real server", { skip: binary ? false : "no `idefics serve`" }, async () => {
  const { url, child } = await serve();
  const { context, page, problems } = await openBrowser(url);
  try {
    assert.equal(await page.locator("#model-name").innerText(), "tiny", "where it lies is not told");
    await page.click("#open-settings");
    await page.locator("#field-max-tokens").fill("8");
    await page.click("#settings >> text=Done");
    await page.click("#composer");
    await page.keyboard.type("who ");
    await pick(page, "444.jpg");
    await pictures(page, 1);
    await page.keyboard.type(" is that");
    await page.keyboard.press("Enter");
    assert.ok((await lastAnswer(page)).length > 0);
    await say(page, "and now");
    await lastAnswer(page);
    await page.waitForSelector(".message:last-child >> text=from cache");
    await screenshot(page, "served");
    await page.click("#model-name");
    await page.waitForSelector("#info >> text=128 tokens");
    await page.click("#info [data-close]");
    await page.click("#new");
    await say(page, "far too many words ".repeat(30));
    await page.waitForSelector(".failure");
    assert.match(await page.locator(".failure").innerText(), /128/);
    assert.deepEqual(problems, []);
  } finally {
    await context.close();
    child.kill();
  }
});
