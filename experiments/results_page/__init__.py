"""``experiments/RESULTS.md`` from the files in ``experiments/results``: tables, pictures, and where we fall short.

``python -m experiments.results_page --help``. A section of the page knows the files that it shows and the commands that
make them; it states what the figures in them say against us, by comparing them, and nothing else.
"""
