"""Measure on one machine what only a GPU can show, in minutes; see ``run.py``."""
