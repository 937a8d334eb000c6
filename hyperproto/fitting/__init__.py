"""Fits on one pass over the data: a start in closed form, a refit, fewer dimensions, and the temperature."""
