"""What torchdnr reaches, measured: a folder per question, and the committed results.

`python -m benchmarks` writes the pages in benchmarks/results from the numbers beside them.
"""
