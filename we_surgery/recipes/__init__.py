"""Whole experiments as files: model, surgery, images, training, and the published figure."""

from we_surgery.recipes.recipe import Recipe as Recipe
from we_surgery.recipes.recipe import load_recipe as load_recipe
from we_surgery.recipes.running import RunResult as RunResult
from we_surgery.recipes.running import run_recipe as run_recipe
