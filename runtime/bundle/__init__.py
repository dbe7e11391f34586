"""Run what was exported: a bundle's manifest, its sessions, a transformer that stands in."""
