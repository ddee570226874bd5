"""Recipes: the choice for a model, and the number of steps with few rows."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from optimizer.config import OptimizerConfig
from optimizer.cycle.methods import METHODS
from optimizer.recipes import METHOD_NAMES, RECIPES, choose_recipe, plan_steps


def count_steps(num_rows: int, batch_size: int, epochs: float) -> int:
    return math.ceil(math.ceil(num_rows / batch_size) * epochs)


@pytest.mark.parametrize(("num_rows", "fewest"), [(40, 20), (70, 36), (130, 40), (300, 40), (2000, 125)])
@pytest.mark.parametrize("method", ["sft", "dpo", "kto"])
@pytest.mark.parametrize("num_parameters", [135e6, 494e6, 7.6e9])
def test_one_cycles_rows_make_a_useful_number_of_steps(num_parameters, method, num_rows, fewest):
    recipe = choose_recipe(int(num_parameters))
    configured = recipe.methods[method].batch_size, recipe.methods[method].epochs
    batch_size, epochs = plan_steps(
        num_rows, batch_size=configured[0], epochs=configured[1], min_steps=recipe.min_steps
    )
    assert count_steps(num_rows, batch_size, epochs) >= fewest
    assert 4 <= batch_size <= configured[0] and configured[1] <= epochs <= 2 * configured[1]


def test_the_batch_shrinks_before_there_are_more_epochs():
    assert plan_steps(130, batch_size=16, epochs=3, min_steps=40) == (8, 3)
    assert plan_steps(130, batch_size=16, epochs=1, min_steps=40) == (4, 40 / 33)
    assert plan_steps(10, batch_size=16, epochs=1, min_steps=40) == (4, 2.0)


def test_enough_rows_leave_the_recipe_as_it_is():
    assert plan_steps(1000, batch_size=16, epochs=1, min_steps=40) == (16, 1)
    assert plan_steps(1, batch_size=8, epochs=5, min_steps=0) == (8, 5)
    assert plan_steps(130, batch_size=2, epochs=1, min_steps=40) == (2, 1)


def test_each_size_of_model_has_its_row():
    small, middle, large = (choose_recipe(int(size)) for size in (3e6, 135e6, 7.6e9))
    assert [recipe for _, recipe in RECIPES] == [small, middle, large]
    assert 7e-4 <= middle.methods["sft"].learning_rate <= 1e-3 and middle.methods["sft"].batch_size == 4
    assert small.min_steps == 0  # measured without a minimum


@pytest.mark.parametrize(("given", "kept"), [("share", "share"), ("window", "window"), ("1", "1"), (3, "3")])
def test_the_gpu_is_shared_taken_in_a_window_or_named(given, kept):
    assert OptimizerConfig(gpu=given).gpu == kept


@pytest.mark.parametrize("given", ["cuda:1", "-1", "both", ""])
def test_a_gpu_that_cannot_be_is_refused(given: str):
    with pytest.raises(ValidationError, match=r"share\|window"):
        OptimizerConfig(gpu=given)


def test_single_entries_of_a_recipe_are_replaced_by_their_names():
    recipe = choose_recipe(3_000_000, {"sft_epochs": 3, "dpo_beta": 0.5, "kto_learning_rate": 1e-5, "lora_rank": 8})
    before = choose_recipe(3_000_000)
    assert (recipe.methods["sft"].epochs, recipe.methods["dpo"].beta, recipe.lora_rank) == (3, 0.5, 8)
    assert recipe.methods["kto"].learning_rate == 1e-5 and recipe.methods["dpo"].epochs == before.methods["dpo"].epochs


@pytest.mark.parametrize("name", ["sft_epoch", "methods", "ppo_epochs", "learning_rate"])
def test_an_entry_that_no_recipe_has_is_refused_with_the_settings(name: str):
    with pytest.raises(ValidationError, match=f"no entry '{name}'.*<method>_epochs"):
        OptimizerConfig(recipe={name: 3})


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        (["sft", "ppo"], r"\['ppo'\]; there is sft, dpo, kto, grpo, distill, search"),
        (["sft", "kto", "sft"], r"\['sft'\] more than once"),
        (["kto", "sft"], r"put it first: \['sft', 'kto'\]"),
    ],
)
def test_methods_that_are_no_sequence_are_refused_with_the_mend(methods, said):
    with pytest.raises(ValidationError, match=said):
        OptimizerConfig(methods=methods)


def test_own_rollouts_need_an_environment():
    with pytest.raises(ValidationError, match=r"\['grpo'\].*name an environment"):
        OptimizerConfig(environment="", practice_episodes=0, explore_episodes=0, methods=["grpo"])


def test_every_recipe_has_the_numbers_of_every_method():
    assert all(tuple(recipe.methods) == METHOD_NAMES for _, recipe in RECIPES)
    assert [method.name for method in METHODS] == list(METHOD_NAMES)
