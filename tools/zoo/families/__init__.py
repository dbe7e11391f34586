"""Families of models, one file each, with a tuple of the family's models."""
