"""The learning rate of each step."""

import math

from common.recipe import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of optimizer step `step`, from 1: linear warm-up, then the schedule, which never reaches 0."""
    if step <= recipe.warmup_steps:
        return recipe.learning_rate * step / recipe.warmup_steps
    share = (step - 1 - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}
    return recipe.learning_rate * factor[recipe.schedule]
