"""Define how each ATen operator is written in ONNX: one rule per operator, in one table."""

from __future__ import annotations

from typing import Any

from ditfastattn.export.operators.base import Rule
from ditfastattn.export.operators.elementwise import ELEMENTWISE
from ditfastattn.export.operators.flags import FLAGS
from ditfastattn.export.operators.gathers import GATHERS
from ditfastattn.export.operators.indexing import INDEXING
from ditfastattn.export.operators.norms import NORMS
from ditfastattn.export.operators.products import PRODUCTS
from ditfastattn.export.operators.shapes import SHAPES
from ditfastattn.export.operators.windows import WINDOWS

RULES: dict[Any, Rule] = {
    **ELEMENTWISE,
    **FLAGS,
    **GATHERS,
    **INDEXING,
    **NORMS,
    **PRODUCTS,
    **SHAPES,
    **WINDOWS,
}
