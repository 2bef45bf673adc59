// Drives the official Node client against the server and prints what it saw as one JSON object.
import OpenAI from "openai";

const [baseURL, apiKey, model] = process.argv.slice(-3);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "Say hello in five words." }];

async function failure(promise) {
  try {
    await promise;
    return null;
  } catch (error) {
    return { status: error.status, code: error.code };
  }
}

const models = [];
for await (const item of client.models.list()) models.push(item.id);

const answer = await client.chat.completions.create({ model, messages, max_tokens: 12 });

let streamed = "";
let finish = null;
const stream = await client.chat.completions.create({ model, messages, max_tokens: 12, stream: true });
for await (const chunk of stream) {
  streamed += chunk.choices[0].delta.content ?? "";
  finish = chunk.choices[0].finish_reason ?? finish;
}

const embedding = await client.embeddings.create({ model, input: "hello" });

console.log(
  JSON.stringify({
    models,
    chat: answer.choices[0].message,
    streamed,
    finish,
    dimensions: embedding.data[0].embedding.length,
    missing: await failure(client.chat.completions.create({ model: "no-such-model", messages })),
    unauthorized: await failure(new OpenAI({ baseURL, apiKey: "sk-wrong", maxRetries: 0 }).models.list()),
  }),
);
