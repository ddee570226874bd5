import Anthropic from "@anthropic-ai/sdk";
import { baseURL, CITIES, CITY_SCHEMA, expect, MAX_TOKENS, MODEL, QUESTION, runChecks, WEATHER_QUESTION } from "./checks.mjs";

const client = new Anthropic({ baseURL: baseURL.replace(/\/v1$/, ""), apiKey: "none", maxRetries: 0, timeout: 300_000 });
const asked = { model: MODEL, max_tokens: MAX_TOKENS };
const messages = [{ role: "user", content: QUESTION }];
const weather = { name: "weather", description: "The weather in a city.", input_schema: CITY_SCHEMA };

await runChecks({
  async chat() {
    const said = await client.messages.create({ ...asked, messages });
    expect(said.content[0].text, "no text");
    expect(said.usage.input_tokens > 0, "no usage");
  },
  async stream() {
    const stream = client.messages.stream({ ...asked, messages });
    let text = "";
    stream.on("text", (piece) => (text += piece));
    const said = await stream.finalMessage();
    expect(text && text === said.content[0].text, "an empty stream");
    expect(said.stop_reason, "no stop_reason");
  },
  async tools() {
    const turns = [{ role: "user", content: WEATHER_QUESTION }];
    const tools = [weather];
    const said = await client.messages.create({ ...asked, messages: turns, tools, tool_choice: { type: "any" } });
    const calls = said.content.filter((block) => block.type === "tool_use");
    expect(calls.length, "no call");
    expect(CITIES.includes(calls[0].input.city), JSON.stringify(calls[0].input));
    turns.push({ role: "assistant", content: said.content });
    const results = calls.map((call) => ({ type: "tool_result", tool_use_id: call.id, content: "rain" }));
    turns.push({ role: "user", content: results });
    const answer = await client.messages.create({ ...asked, messages: turns, tools, tool_choice: { type: "none" } });
    expect(answer.content[0].type === "text", "no answer after the tool");
  },
  async structured() {
    const output_config = { format: { type: "json_schema", schema: CITY_SCHEMA } };
    const said = await client.messages.create({ ...asked, max_tokens: 200, messages, output_config });
    expect(CITIES.includes(JSON.parse(said.content[0].text).city), said.content[0].text);
  },
});
