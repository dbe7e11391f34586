"""``python -m ditfastattn.tools.gpu_report``."""

from ditfastattn.tools.gpu_report.run import app

app()
