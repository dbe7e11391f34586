"""Serve images over HTTP by a plan book or a bundle."""
