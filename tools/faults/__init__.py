"""Inject faults, and count what becomes of them: see ``run.py``."""
