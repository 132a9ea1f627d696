"""Reports of an evaluation: tables, CSV, HTML and figures."""
