"""docs/bundle-format.md says what the reader of bundles takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import onnx

from ditfastattn import Strategy
from ditfastattn.runtime.bundle.golden import GOLDEN_FILE
from ditfastattn.runtime.bundle.manifest import MANIFEST, SCHEMA_VERSION, manifest_schema
from tests.export.helpers import export_tiny
from tests.helpers import capture_every_site, tiny_dit, uniform_strategies

DOCS = Path(__file__).parents[2] / "docs"
WRITE = "python -c 'from ditfastattn.runtime.bundle.manifest import *; print(manifest_schema())'"


def test_the_schema_of_the_docs_is_the_readers() -> None:
    written = json.loads((DOCS / "bundle-manifest.schema.json").read_text())
    assert written == json.loads(manifest_schema()), f"write it anew: {WRITE}"


def test_a_manifest_has_the_fields_of_the_schema(tmp_path: Path) -> None:
    tiny = tiny_dit()
    rows = uniform_strategies(capture_every_site(tiny)[1], Strategy.SHARE_STEP)
    export_tiny(tiny, rows, tmp_path / "bundle")
    data = json.loads((tmp_path / "bundle" / MANIFEST).read_text())
    schema = json.loads(manifest_schema())
    assert data.keys() == schema["properties"].keys()
    assert schema["additionalProperties"] is False
    graph = onnx.load(tmp_path / "bundle" / "variant_01.onnx", load_external_data=False)
    told = {entry.key: entry.value for entry in graph.metadata_props}
    steps = [step for step, variant in enumerate(data["schedule"]) if variant == 1]
    assert told["ditfastattn.steps"] == ",".join(map(str, steps))
    assert told["ditfastattn.plan_sha256"] == data["plan_sha256"]
    assert graph.producer_version == data["ditfastattn"]
    page = (DOCS / "bundle-format.md").read_text()
    assert f"schema version is {SCHEMA_VERSION}" in page
    for file in data["files"]:
        assert f"`{re.sub('_[0-9]+', '_NN', file)}`" in page
    assert GOLDEN_FILE in data["files"]
    fields = {field.split(".")[0] for field in re.findall(r"`([a-z_]+)`", page)}
    assert {"latent", "timestep", "inputs", "outputs", "fixed_batch", "batch_multiple"} <= fields
