import OpenAI from "openai";
import { baseURL, CITIES, CITY_SCHEMA, expect, MAX_TOKENS, MODEL, QUESTION, runChecks, WEATHER_QUESTION } from "./checks.mjs";

const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 300_000 });
const asked = { model: MODEL, max_tokens: MAX_TOKENS };
const messages = [{ role: "user", content: QUESTION }];
const weather = { type: "function", function: { name: "weather", parameters: CITY_SCHEMA } };

await runChecks({
  async chat() {
    const said = await client.chat.completions.create({ ...asked, messages });
    expect(said.choices[0].message.content, "no content");
  },
  async stream() {
    let text = "";
    for await (const piece of await client.chat.completions.create({ ...asked, messages, stream: true }))
      text += piece.choices[0]?.delta?.content ?? "";
    expect(text, "an empty stream");
  },
  async tools() {
    const turns = [{ role: "user", content: WEATHER_QUESTION }];
    const tools = [weather];
    const said = await client.chat.completions.create({ ...asked, messages: turns, tools, tool_choice: "required" });
    const message = said.choices[0].message;
    expect(message.tool_calls?.length, `no call: ${message.content}`);
    expect(CITIES.includes(JSON.parse(message.tool_calls[0].function.arguments).city), "no city");
    turns.push(message);
    for (const call of message.tool_calls) turns.push({ role: "tool", tool_call_id: call.id, content: "rain" });
    const answer = await client.chat.completions.create({ ...asked, messages: turns, tools, tool_choice: "none" });
    expect(answer.choices[0].message.content !== null, "no answer after the tool");
  },
  async structured() {
    const json_schema = { name: "city", schema: CITY_SCHEMA, strict: true };
    const response_format = { type: "json_schema", json_schema };
    const said = await client.chat.completions.create({ ...asked, max_tokens: 200, messages, response_format });
    expect(CITIES.includes(JSON.parse(said.choices[0].message.content).city), said.choices[0].message.content);
  },
  async embeddings() {
    const given = await client.embeddings.create({ model: "all-MiniLM-L6-v2", input: ["rain", "sunshine"] });
    expect(given.data.length === 2 && given.data[0].embedding.length === 384, `${given.data.length} vectors`);
  },
  async responses() {
    const said = await client.responses.create({ model: MODEL, input: QUESTION, max_output_tokens: MAX_TOKENS });
    expect(said.output_text, "no text");
  },
});
