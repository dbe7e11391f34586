"""Read, build, verify and outline FX graphs; cache slots."""
