"""Choose what writes the graphs of a bundle, by its format."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ditfastattn.export.graph_files import GraphFiles, OnnxFiles, Written
from ditfastattn.export.options import ExportOptions
from ditfastattn.export.partial import PartialBundle
from ditfastattn.export.prepare import PreparedModel
from ditfastattn.runtime.bundle.manifest import Format


@contextmanager
def files_of(
    prepared: PreparedModel,
    partial: PartialBundle,
    options: ExportOptions,
    written: Written,
    out: Path,
) -> Generator[GraphFiles]:
    """Yield what writes graphs, and calls ``written`` with the file of each.

    A bundle in ``out`` is about to be replaced.
    """
    if options.format is Format.ONNX:
        yield OnnxFiles(partial, written)
        return
    from ditfastattn.export.aoti.compilations import Compilations, helper_count
    from ditfastattn.export.aoti.earlier import earlier_packages
    from ditfastattn.export.aoti.files import PackageFiles
    from ditfastattn.export.aoti.options import compile_for
    from ditfastattn.export.aoti.region_files import RegionFiles

    device = prepared.captures.first.tensors[0].device
    made, batches = compile_for(device, options.isa), prepared.captures.batches
    kind = RegionFiles if options.regions else PackageFiles
    with Compilations(helper_count() if device.type == "cpu" else 0) as compilations:
        yield kind(partial, batches, made, compilations, written, earlier_packages(out))
