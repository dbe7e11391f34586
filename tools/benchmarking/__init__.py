"""Parts of the ``tools.benchmark_*`` commands."""
