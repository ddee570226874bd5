import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import { baseURL, CITIES, CITY_SCHEMA, expect, MAX_TOKENS, MODEL, ModelLimit } from "./checks.mjs";
import { QUESTION, runChecks, WEATHER_QUESTION } from "./checks.mjs";

const provider = createOpenAICompatible({ name: "ours", baseURL, apiKey: "none", supportsStructuredOutputs: true });
const asked = { model: provider(MODEL), maxOutputTokens: MAX_TOKENS, maxRetries: 0 };

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
    // The first step is a forced call; the second gets its result and answers with a text.
    const prepareStep = ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" });
    const { steps } = await generateText({
      ...asked,
      prompt: WEATHER_QUESTION,
      tools,
      prepareStep,
      stopWhen: stepCountIs(2),
    });
    // the SDK runs no call of a reply that was cut
    if (steps[0].finishReason === "length") throw new ModelLimit("it wrote call after call until it was cut");
    expect(CITIES.includes(called[0]), `called ${JSON.stringify(called)}`);
    expect(steps.length === 2, `${steps.length} steps: the result was not sent back`);
  },
  async structured() {
    const schema = jsonSchema(CITY_SCHEMA);
    const { object } = await generateObject({ ...asked, maxOutputTokens: 200, prompt: QUESTION, schema });
    expect(CITIES.includes(object.city), JSON.stringify(object));
  },
});
