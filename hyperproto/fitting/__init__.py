"""A start from the data: one pass over the features, then assignment and projection in closed form."""
