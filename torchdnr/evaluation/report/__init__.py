"""Reports of an evaluation: tables, CSV and HTML."""
