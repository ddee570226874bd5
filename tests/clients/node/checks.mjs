export const baseURL = process.env.CLIENT_BASE_URL;
export const MODEL = "agent";
export const MAX_TOKENS = 96;
export const QUESTION = "Say hello to Oslo.";
export const WEATHER_QUESTION = "How is the weather in Oslo? Use the tool.";
// Names to choose from, not a free text: the checks are of formats, and a small model may not end a text by itself.
export const CITIES = ["Oslo", "Bergen"];
export const CITY_SCHEMA = {
  type: "object",
  properties: { city: { type: "string", enum: CITIES } },
  required: ["city"],
  additionalProperties: false,
};

export function expect(holds, what) {
  if (!holds) throw new Error(what);
}

// The server did its part, and the model did not.
export class ModelLimit extends Error {}

export async function runChecks(checks) {
  for (const [check, run] of Object.entries(checks)) {
    let outcome = "passed";
    let reason = "";
    try {
      await run();
    } catch (error) {
      outcome = error instanceof ModelLimit ? "model" : "failed";
      reason = `${error.constructor.name}: ${error.message}`.slice(0, 400);
    }
    console.log(JSON.stringify({ check, outcome, reason }));
  }
}
