"""The parser for a model's calls, and whether its template renders tools, with the files of real models."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import structlog

from runtime.config import EngineConfig
from runtime.engine.server_command import server_arguments
from runtime.engine.tool_format import choose_tool_call_parser, read_chat_template, shows_tools
from tests.optimizer.families import read_template

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
CHATML = (  # SmolLM2's own, which silently drops tools
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{{ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_model(path: Path, config: dict, template: str | None, *tokens: str) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    added = [{"id": number, "content": token} for number, token in enumerate(tokens)]
    (path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


def choose(path: Path) -> str:
    return choose_tool_call_parser(path, read_chat_template(path))


@pytest.mark.parametrize(
    ("template", "tokens", "parser"),
    [
        ("qwen2_5", [], "hermes"),
        ("qwen3", [], "hermes"),
        ("qwen3_5_think", [], "qwen3_coder"),
        ("glm4moe", [], "glm45"),
        ("llama3_1", ["<|python_tag|>"], "llama3_json"),
        ("llama3_2", ["<|python_tag|>"], "llama3_json"),
        ("mistral_v7", ["[TOOL_CALLS]"], "mistral"),
        ("mistral_v11", ["[TOOL_CALLS]"], "mistral"),
        ("mistral_v7", [], "hermes"),  # vLLM's parser would not find its token
    ],
)
def test_the_template_and_the_tokens_choose_the_parser(tmp_path: Path, template: str, tokens: list[str], parser: str):
    path = make_model(tmp_path, LLAMA, read_template(template), *tokens)
    assert choose(path) == parser
    assert shows_tools(read_chat_template(path))


@pytest.mark.parametrize("config", [LLAMA, {"model_type": "mistral"}, {"model_type": "gpt2"}])
def test_a_model_that_says_nothing_of_calls_starts_with_the_fallback_and_a_message(tmp_path: Path, config: dict):
    path = make_model(tmp_path, config, CHATML, "<|im_start|>")
    with structlog.testing.capture_logs() as said:
        given = server_arguments(EngineConfig(), path, 7)
    assert given[given.index("--tool-call-parser") + 1] == "hermes"
    assert "engine.tool_call_parser" in said[0]["event"]


def test_a_qwen_without_a_template_has_the_parser_of_its_family(tmp_path: Path):
    assert choose(make_model(tmp_path, {"model_type": "new", "architectures": ["Qwen4ForCausalLM"]}, None)) == "hermes"


def test_a_template_for_tools_among_several_is_the_one_that_counts(tmp_path: Path):
    templates = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": read_template("qwen3")}]
    path = make_model(tmp_path, LLAMA, None)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert choose(path) == "hermes" and shows_tools(read_chat_template(path))


@pytest.mark.parametrize("name", ["llama3", "gemma", "phi3", "deepseekv3", "smolvlm"])
def test_a_template_without_tools_is_seen(name: str):
    template = files("trl").joinpath("chat_templates", f"{name}.jinja").read_text(encoding="utf-8")
    assert not shows_tools(template)
    assert not shows_tools("{# no tools here #}" + CHATML)


@pytest.mark.parametrize("form", ["--chat-template {}", "--chat-template={}"])
def test_the_template_that_the_operator_gives_is_the_one_that_counts(tmp_path: Path, form: str):
    path = make_model(tmp_path, LLAMA, CHATML)
    (tmp_path / "ours.jinja").write_text(read_template("qwen3"))
    given = form.format(tmp_path / "ours.jinja").split(" ")
    assert not shows_tools(read_chat_template(path))
    assert shows_tools(read_chat_template(path, given))
