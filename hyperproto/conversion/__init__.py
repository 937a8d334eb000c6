"""Models in and out: find the classifier, put a hyperspherical head in its place, and undo it."""
