from __future__ import annotations

import random

import pytest

from memory.records.insights import OperationKind
from memory.schema import Insight
from optimizer.insights.contrast import (
    Outcomes,
    align,
    are_rivals,
    contrast_insights,
    count_outcomes,
    find_answers,
    find_best_actions,
    find_lessons,
    read_words,
)
from tests.optimizer.worlds import live

FOODS = ["carrot", "red onion", "banana", "pork chop", "bell-pepper", "salmon"]
APPLIANCES = {"fry": "stove", "roast": "oven", "grill": "toaster"}


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def cook_at_random(num_episodes: int, seed: int = 0, appliances=APPLIANCES, has_rules: bool = True):
    """Play a kitchen at random: a wrong appliance loses, a right one is needed to win, but not enough."""
    dice = random.Random(seed)
    graded = []
    for task in range(num_episodes):
        verbs = dice.sample(sorted(appliances), 2)
        foods = dice.sample(FOODS, 2)
        recipe = "Ingredients:\n" + "\n".join(foods) + "\nDirections:\n"
        recipe += "\n".join(f"{verb} the {food}" for verb, food in zip(verbs, foods, strict=True)) + "\nprepare meal"
        moves = [("read cookbook", recipe)]
        moves += [(f"take {food} from fridge", f"You take the {food} from the fridge.") for food in foods]
        is_alive = True
        for verb, food in zip(verbs, foods, strict=True):
            appliance = dice.choice(sorted(appliances.values()))
            is_alive = not has_rules or appliance == appliances[verb]
            moves.append((f"cook {food} with {appliance}", f"You cook the {food}."))
            if not is_alive:
                break
        won = is_alive and dice.random() < (0.7 if has_rules else 0.3)
        if is_alive:
            moves.append(("prepare meal", "Done.") if won else ("eat table", "You lose."))
        graded.append(live(moves, task=str(task), is_success=won, text="Find the recipe and cook it."))
    return graded


def known(text: str) -> Insight:
    return Insight(id=f"ins_{text}", environment="kitchen", kind="cooking", text=text)


def test_the_words_that_line_and_action_share_become_the_blank():
    (found,) = align(words("fry the red onion"), words("cook red onion with stove"))

    assert (found.cue, found.action) == (words("fry the _"), words("cook _ with stove"))
    assert found.entity == words("red onion")


def test_an_overlap_of_small_words_only_is_no_answer():
    assert align(words("put it on the table"), words("go to the kitchen")) == []
    assert align(words("a carrot"), words("take carrot")) == []


def test_rivals_differ_in_one_short_span_around_a_blank():
    assert are_rivals(words("cook _ with stove"), words("cook _ with toaster oven"))
    assert are_rivals(words("slice _ with knife"), words("chop _ with knife"))
    assert not are_rivals(words("take _"), words("cook _ with stove"))
    assert not are_rivals(words("take _ from fridge"), words("cook _ with stove"))


def test_blame_falls_with_the_distance_to_the_end():
    lost = live(
        [("look", "fry the carrot"), ("cook carrot with stove", "Hm."), ("wait", "You lose!")], is_success=False
    )

    outcomes = count_outcomes(find_answers([lost, lost]))

    assert outcomes[words("fry the _")][words("cook _ with stove")].losses == 1.0


def test_the_rules_of_a_kitchen_are_found_among_distractors():
    operations = contrast_insights(cook_at_random(150), known=[])

    assert {operation.text for operation in operations} == {
        f"{verb} the _ -> cook _ with {appliance}" for verb, appliance in APPLIANCES.items()
    }
    assert all(operation.kind is OperationKind.ADD for operation in operations)
    assert all(operation.counts.wins > operation.counts.losses for operation in operations)
    assert all(operation.counts.losses_otherwise > operation.counts.wins_otherwise for operation in operations)


def test_what_only_stood_by_when_a_rule_worked_is_no_rule():
    dice, graded = random.Random(0), []
    for task in range(120):
        verb, food = dice.choices(["fry", "roast"], [0.85, 0.15])[0], dice.choice(FOODS)
        appliance = dice.choice(["stove", "oven"])
        moves = [
            ("read cookbook", f"{verb} the {food}"),
            (f"take {food}", f"You take the {food} from the fridge."),
            (f"cook {food} with {appliance}", "The End"),
        ]
        graded.append(live(moves, task=str(task), is_success=appliance == APPLIANCES[verb]))
    answers = find_answers(graded)
    bystander = "you take the _ from the fridge -> cook _ with stove"

    assert bystander in {contrast.text for contrast in find_best_actions(count_outcomes(answers))}
    lessons, _ = find_lessons(answers)
    assert {lesson.text for lesson in lessons} == {"fry the _ -> cook _ with stove", "roast the _ -> cook _ with oven"}
    operations = contrast_insights(graded, known=[known(bystander)])
    assert OperationKind.REMOVE in {operation.kind for operation in operations if operation.text == bystander}


@pytest.mark.parametrize("seed", range(5))
def test_chance_alone_teaches_nothing(seed):
    graded = cook_at_random(150, seed=seed, has_rules=False)

    assert contrast_insights(graded, known=[]) == []


def test_what_memory_said_is_not_extracted_again():
    echo = [
        live([(f"cook {food} with stove", "Done.")], memory_text=f"<memory>\nfry the {food}\n</memory>", task=food)
        for food in FOODS
    ]

    assert not find_answers(echo)


def test_a_cue_with_one_action_only_carries_no_contrast():
    outcomes = {words("fry the _"): {words("cook _ with stove"): Outcomes(wins=50, num_tries=50)}}

    assert find_best_actions(outcomes) == []


def test_a_blank_that_one_thing_always_fills_is_no_lesson():
    right, wrong = words("slice carrot with _"), words("slice onion with _")
    knife = {words("knife")}
    outcomes = {words("there is a _ here"): {right: Outcomes(30, 0.0, 30, knife), wrong: Outcomes(0, 30.0, 30, knife)}}

    assert find_best_actions(outcomes) == []


def test_an_action_that_survives_early_and_wins_late_is_found_in_few_episodes():
    operations = contrast_insights(cook_at_random(60), known=[])

    assert len(operations) >= 2


def test_a_believed_insight_is_agreed_with_or_removed_by_its_outcomes():
    beliefs = [known("fry the _ -> cook _ with stove"), known("roast the _ -> cook _ with stove")]

    operations = contrast_insights(cook_at_random(150), known=beliefs)

    by_text = {operation.text: operation.kind for operation in operations}
    assert by_text["fry the _ -> cook _ with stove"] is OperationKind.AGREE
    assert by_text["roast the _ -> cook _ with stove"] is OperationKind.REMOVE


def test_words_keep_hyphens_and_lose_punctuation():
    assert read_words("Fry the Bell-Pepper, twice!") == words("fry the bell-pepper twice")
