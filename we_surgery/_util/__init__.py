"""Text, progress and torch helpers that several rooms need.

May import: ``errors``. To add one: only what at least two rooms use and what knows no excitation.
"""
