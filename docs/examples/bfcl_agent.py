"""The command `bfcl` with the model `agent`, which its list lacks.

The list of `bfcl-eval` says which client asks a model and how its calls are read. `agent` is asked by its client of
OpenAI's chat completions, with the functions as tools:

    pip install bfcl-eval
    export OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=none BFCL_PROJECT_ROOT=$PWD
    python docs/examples/bfcl_agent.py generate --model agent --test-category simple_python --num-threads 8
    python docs/examples/bfcl_agent.py evaluate --model agent --test-category simple_python
"""

from __future__ import annotations

from bfcl_eval.__main__ import cli
from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING, ModelConfig
from bfcl_eval.model_handler.api_inference.openai_completion import OpenAICompletionsHandler

MODEL_CONFIG_MAPPING["agent"] = ModelConfig(
    model_name="agent",
    display_name="agent",
    url="http://127.0.0.1:8080",
    org="",
    license="",
    model_handler=OpenAICompletionsHandler,
    is_fc_model=True,
    underscore_to_dot=True,  # names of tools have no dots, and the client sends them so
)

if __name__ == "__main__":
    cli()
