"""Listening tests: draw the pairs (plan), write the page (page, media), sum up the answers (scores, chart)."""
