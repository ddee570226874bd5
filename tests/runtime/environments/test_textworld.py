"""The real game: its tasks are disjoint, its text is clean, its score is the reward."""

from __future__ import annotations

import json
import random

import pytest

from memory.schema import Split
from runtime.environments.textworld import FAMILIES, TextWorld, cooking_settings, readable
from runtime.environments.textworld_expert import DONE, play_as_expert, write_transcripts
from runtime.errors import TaskSealed, UnknownTask


@pytest.fixture(scope="module")
def textworld_environment(tmp_path_factory) -> TextWorld:
    return TextWorld(tmp_path_factory.mktemp("games"))


def test_the_families_of_seeds_are_disjoint():
    families = [set(family) for family in FAMILIES.values()]
    assert sum(map(len, families)) == len(set().union(*families))


def test_no_list_of_tasks_names_a_sealed_one(textworld_environment):
    sealed = {task.name for task in textworld_environment.sealed_tasks(100)}
    everything = {task.name for task in textworld_environment.tasks(Split.HELD_OUT, 200_000)}

    assert len(sealed) == 100 and len(everything) == 90_000 and not sealed & everything
    assert {textworld_environment.task(name).split for name in sealed} == {Split.HELD_OUT}
    for name in ("990000", "0990001", "999999"):
        with pytest.raises(TaskSealed, match=f"{name}.* is sealed: only the report of a release plays it"):
            textworld_environment.open_task(name)
    assert textworld_environment.open_task("989999").split is Split.HELD_OUT


@pytest.mark.parametrize(
    ("name", "is_held_out"), [("900000", True), ("989999", True), ("995000", True), ("500000", False), ("a", False)]
)
def test_a_task_is_held_out_by_its_name_whether_it_is_listed_or_not(
    textworld_environment, name: str, is_held_out: bool
):
    assert textworld_environment.holds_out(name, []) is is_held_out
    assert not textworld_environment.holds_out(None, ["You are hungry!"])


def test_a_task_is_found_again_by_its_name(textworld_environment):
    for task in textworld_environment.tasks(Split.HELD_OUT, 5, offset=7):
        assert textworld_environment.task(task.name) == task
        assert task.split is Split.HELD_OUT


@pytest.mark.parametrize("name", ["", "kitchen", "-1", "99999999999", "9e5", "٣"])
def test_an_unknown_task_is_named_with_the_seeds_that_exist(textworld_environment, name):
    with pytest.raises(UnknownTask, match=r"held-out 900000\.\.999999") as raised:
        textworld_environment.task(name)
    assert repr(name) in str(raised.value)


async def test_an_expert_wins_and_the_score_is_the_reward(textworld_environment):
    task = textworld_environment.task("100000")
    game = await textworld_environment.start(task)
    transcript = play_as_expert(game, random.Random(0), idle_rate=0.2)
    outcome = await game.close()
    assert transcript.is_won and outcome.value == 1.0
    assert "won with" in outcome.reason


async def test_haste_burns_what_care_finds_done(textworld_environment):
    task = textworld_environment.task("100018")  # the tuna in the fridge is fried already
    transcripts = {}
    for is_careful in (True, False):
        game = await textworld_environment.start(task)
        transcripts[is_careful] = play_as_expert(game, random.Random(0), is_careful=is_careful)
        await game.close()
    assert transcripts[True].is_won and not transcripts[False].is_won
    assert any(DONE in move.says for move in transcripts[True].moves)
    assert "You burned" in transcripts[False].moves[-1].observation


async def test_a_wrong_cut_or_a_wrong_appliance_ends_the_game_at_once(textworld_environment):
    game = await textworld_environment.start(textworld_environment.task("100001"))  # slice and fry a carrot we hold
    assert "fry the carrot" in await game.tools[0].call({"command": "examine cookbook"})
    assert "You lost" in await game.tools[0].call({"command": "cook carrot with oven"})
    assert game.is_done and "You lost" in game.closing_text
    assert await game.tools[0].call({"command": "look"}) == "The game is over."
    assert 0.0 <= (await game.close()).value < 1.0


async def test_what_the_agent_reads_holds_no_banner_score_or_prompt(textworld_environment):
    game = await textworld_environment.start(textworld_environment.task("100002"))
    seen = [game.task_text] + [game.step(command) for command in ("examine cookbook", "take knife", "frobnicate")]
    await game.close()
    for text in seen:
        assert not any(noise in text for noise in ("$$", "score", "-=  ", ">", "RESTART", "\n\n"))
    assert seen[0].startswith("You are hungry!") and "You are carrying" in seen[0]
    assert seen[1].startswith("Ingredients:\n")


def test_readable_keeps_the_games_last_words():
    raw = "\nYou eat the meal.\n\n\n   *** The End ***\n\nYou scored 8 out of a possible 8, in 9 turns.\n\nWould you\n>"
    assert readable(raw) == "You eat the meal.\n*** The End ***"


def test_a_seed_always_gives_the_same_difficulty():
    assert cooking_settings(900_001) == cooking_settings(900_001)
    assert {cooking_settings(seed)["recipe"] for seed in range(900_000, 900_050)} == {1, 2, 3}


async def test_transcripts_hold_won_games_and_what_a_student_must_know(textworld_environment, tmp_path):
    num_won = await write_transcripts(textworld_environment, tmp_path / "transcripts.json", num_games=2)
    source = json.loads((tmp_path / "transcripts.json").read_text())
    careful = [each for each in source["transcripts"] if each["is_careful"]]
    assert len(source["transcripts"]) == 8 and len(careful) == 4
    assert all(each["is_won"] for each in careful)
    assert num_won == sum(each["is_won"] for each in source["transcripts"])
    assert source["foods"] and source["tool"]["function"]["name"] == "act"
