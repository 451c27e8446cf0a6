"""Recipes: the options of models and runs, models by name, learning-rate schedules."""
