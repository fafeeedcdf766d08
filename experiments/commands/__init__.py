"""The commands of ``python -m experiments``: their options, and what is checked before anything is run.

torch and matplotlib take seconds to import. Each command imports them when it is called, so that ``--help`` answers at once.
"""
