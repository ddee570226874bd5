import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import { baseURL, CITY_SCHEMA, expect, MODEL, QUESTION, runChecks, WEATHER_QUESTION } from "./checks.mjs";

const provider = createOpenAICompatible({ name: "ours", baseURL, apiKey: "none", supportsStructuredOutputs: true });
const asked = { model: provider(MODEL), maxOutputTokens: 48, maxRetries: 0 };

await runChecks({
  async chat() {
    expect((await generateText({ ...asked, prompt: QUESTION })).text, "no text");
  },
  async stream() {
    let text = "";
    for await (const piece of streamText({ ...asked, prompt: QUESTION }).textStream) text += piece;
    expect(text, "an empty stream");
  },
  async tools() {
    const called = [];
    const execute = async ({ city }) => {
      called.push(city);
      return "rain";
    };
    const tools = { weather: tool({ description: "The weather.", inputSchema: jsonSchema(CITY_SCHEMA), execute }) };
    const stopWhen = stepCountIs(1);
    await generateText({ ...asked, prompt: WEATHER_QUESTION, tools, toolChoice: "required", stopWhen });
    expect(typeof called[0] === "string", `called ${JSON.stringify(called)}`);
  },
  async structured() {
    const schema = jsonSchema(CITY_SCHEMA);
    const { object } = await generateObject({ ...asked, maxOutputTokens: 200, prompt: QUESTION, schema });
    expect(typeof object.city === "string", JSON.stringify(object));
  },
});
