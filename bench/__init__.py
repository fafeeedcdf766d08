"""Which stencil can I afford at which resolution, and is this as fast as it can be? ``python -m bench`` measures it here."""
