"""Pure solvers of the assignment step: which prototype stands for which label."""
