"""Properties of losses: each a function that raises AssertionError for a subject without it."""
