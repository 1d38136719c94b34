"""Programs for the developers of the package. They are not part of it: no module of vab imports them."""
