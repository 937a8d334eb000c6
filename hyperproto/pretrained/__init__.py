"""Whole models: a converted one from its checkpoint, and folders that hold all that one is."""
