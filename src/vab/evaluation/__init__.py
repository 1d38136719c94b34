"""From sounds to numbers: folders, what judges compute, metrics, reports, retrieval and listening tests."""
