"""Listening tests: which pairs are heard (plan), the page that asks (page), what the answers say (scores, chart)."""
