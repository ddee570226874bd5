"""The pocket model's corpus equals vLLM's prompts, character by character and token by token."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from memory.records.exemplars import render_exemplar
from memory.schema import Step, StepKind
from optimizer.pretraining.chat import header
from optimizer.pretraining.corpus import COOKING, CUTTING, PHRASES, Corpus, Kitchen, Mixture
from optimizer.pretraining.tokenizer import train_tokenizer
from optimizer.pretraining.train import Recipe, encode, make_model, pretrain

TOOL = {
    "type": "function",
    "function": {
        "name": "act",
        "description": "Give the game one command.",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
    },
}
FOODS = ["carrot", "pork chop", "red onion", "egg", "lettuce", "salt", "tomato", "milk"]
RECIPE = "Ingredients:\npork chop\nDirections:\nchop the pork chop\nfry the pork chop\nprepare meal"


def move(
    command: str, observation: str, direction: str | None = None, *, says: str = "", is_idle: bool = False
) -> dict:
    return {"command": command, "says": says, "observation": observation, "direction": direction, "is_idle": is_idle}


TRANSCRIPT = {
    "seed": 1,
    "task_text": "You are hungry!\nYou see a fried egg.\nYou are carrying: a pork chop.",
    "is_careful": False,
    "moves": [
        move("examine cookbook", RECIPE),
        move("look", "A kitchen.", is_idle=True),
        move("open fridge", "You open it.", says="1. chop the pork chop\n2. fry the pork chop\n3. prepare meal"),
        move("chop pork chop with knife", "You chop the pork chop.", "chop", says="Now 1. chop the pork chop"),
        move("cook pork chop with stove", "You fried the pork chop.", "fry", says="Now 2. fry the pork chop"),
        move("prepare meal", "There it is.", says="Now 3. prepare meal"),
        move("eat meal", "*** The End ***"),
    ],
    "is_won": True,
}


@pytest.fixture
def corpus() -> Corpus:
    return Corpus([TRANSCRIPT], FOODS, system_prompt="You play.", tool=TOOL, seed=3)


@pytest.fixture
def tokenizer(corpus):
    texts = ["".join(piece.text for piece in corpus.episode(Mixture(recitals=0.1, drills=0.3))) for _ in range(50)]
    return train_tokenizer(texts, header=header("You play.", TOOL), phrases=PHRASES, vocab_size=600)


def as_messages(text: str) -> list[dict]:
    """Parse an episode's text back into messages."""
    messages = [{"role": "system", "content": "You play."}]
    for part in text.split("<|im_start|>")[2:]:
        role, _, content = part.removesuffix("\n").removesuffix("<|im_end|>").partition("\n")
        if content.startswith("<tool_response>"):
            inner = content.removeprefix("<tool_response>\n").removesuffix("\n</tool_response>")
            messages.append({"role": "tool", "content": inner})
        elif role == "assistant":
            if "<tool_call>" not in content:
                messages.append({"role": "assistant", "content": content})
                continue
            thought, _, call = content.rpartition("<tool_call>\n")
            command = call.split('"command": "')[1].split('"')[0]
            function = {"name": "act", "arguments": {"command": command}}
            messages.append(
                {"role": "assistant", "content": thought.rstrip("\n"), "tool_calls": [{"function": function}]}
            )
        else:
            messages.append({"role": role, "content": content})
    return messages


@pytest.mark.parametrize("make", ["play", "drill", "recital"])
def test_pieces_and_template_agree_to_the_character_and_the_token(corpus, tokenizer, make):
    for _ in range(20):
        pieces = getattr(corpus, make)()
        text = "".join(piece.text for piece in pieces)
        rendered = tokenizer.apply_chat_template(as_messages(text), tools=[TOOL], tokenize=False)
        assert rendered == text
        assert encode(pieces, tokenizer)[0] == tokenizer(rendered, add_special_tokens=False).input_ids


def test_idle_moves_and_frames_are_not_learned_but_actions_are(corpus):
    weights = {piece.text: piece.weight for piece in corpus.play()}
    assert weights["look"] == 0.0 and weights["<|im_start|>assistant\n"] == 0.0
    assert weights["examine cookbook"] == 1.0 and weights["eat meal"] == 1.0


def test_a_kitchen_permutes_what_is_read_and_never_what_works():
    kitchen = Kitchen.of(
        {"fry": "roast", "roast": "fry", "chop": "dice", "slice": "slice", "dice": "chop"}, {"pork chop": "egg"}
    )
    assert kitchen.see("chop the pork chop\nfry it; a fried pork chop") == "dice the egg\nroast it; a roasted egg"
    assert kitchen.rename("chop pork chop with knife") == "chop egg with knife"
    assert kitchen.rules()["dice"] == CUTTING["chop"] and kitchen.rules()["roast"] == COOKING["fry"]


def test_a_solved_game_is_shown_as_memory_will_show_it():
    kitchen = Kitchen.of({verb: verb for verb in (*COOKING, *CUTTING)}, {food: food for food in FOODS})
    steps = []
    for each in TRANSCRIPT["moves"]:
        if each["is_idle"]:
            continue
        verb = each["direction"]
        thought = f"{each['says']}\n{verb} the _ -> {({**COOKING, **CUTTING})[verb]}" if verb else each["says"]
        call = {"function": {"name": "act", "arguments": {"command": each["command"]}}}
        steps.append(
            Step(trajectory_id="t", position=len(steps), kind=StepKind.MODEL, content=thought, tool_calls=[call])
        )
        steps.append(Step(trajectory_id="t", position=len(steps), kind=StepKind.TOOL, content=each["observation"]))
    assert Corpus._exemplar(TRANSCRIPT, kitchen) == render_exemplar(TRANSCRIPT["task_text"], steps)


def test_pretraining_goes_on_where_it_stopped_and_exports_a_model(tmp_path):
    source = {"system_prompt": "You play.", "tool": TOOL, "foods": FOODS, "transcripts": [TRANSCRIPT]}
    (tmp_path / "transcripts.json").write_text(json.dumps(source))
    tiny = {"hidden_size": 128, "num_layers": 2, "intermediate_size": 64, "vocab_size": 600}
    recipe = Recipe(batch_tokens=1152, lengths=(576, 1152), num_tokens=4_000, **tiny)
    pretrain(tmp_path / "transcripts.json", tmp_path / "out", recipe, device="cpu")
    recipe.num_tokens = 8_000
    pretrain(tmp_path / "transcripts.json", tmp_path / "out", recipe, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "qwen2" and model.dtype == torch.bfloat16
    assert not list((tmp_path / "out-course").glob("*.partial"))


def test_a_new_model_looks_rules_up_before_it_is_trained(corpus, tokenizer):
    recipe = Recipe(vocab_size=600)
    model = make_model(recipe, tokenizer)
    ids, weights = encode(corpus.recital(), tokenizer)
    with torch.no_grad():
        predicted = model(torch.tensor([ids])).logits[0, :-1].argmax(-1).tolist()
    looked_up = [place for place, weight in enumerate(weights) if weight == corpus.weights.rule]
    hits = sum(predicted[place - 1] == ids[place] for place in looked_up)
    assert hits / len(looked_up) > 0.5
