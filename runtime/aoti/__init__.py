"""Run bundles of AOTInductor packages."""
