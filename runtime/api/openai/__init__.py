"""OpenAI's chat completions, Responses and models: request, turn and answer of each."""
