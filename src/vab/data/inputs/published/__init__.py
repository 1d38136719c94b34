"""Data sets as they are published, as the CSVs that ``vab extract`` reads: file, labels, start, id.

``rows`` holds the CSVs, ``names`` what files are called, the others a data set each, or two of one kind.
"""
