"""``report.html``: what a command has found, as one page to look at, without any network."""
