"""What is to be extracted: folders, CSVs, lists of published data sets."""
