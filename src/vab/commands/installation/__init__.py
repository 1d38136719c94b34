"""Parts of ``vab doctor``: what is declared, what another process finds, how it is told. Nothing here needs torch."""
