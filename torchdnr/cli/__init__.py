"""The command lines: their options, run folders and reports."""
