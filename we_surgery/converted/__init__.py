"""The converted form: excited layers and graph nodes, convert, strip, and the proof of both.

May import: ``planning`` and what is below it. To add a kind of owner of an excited weight: a
class beside ``layer.py`` (modules) and ``graphs.py`` (torch.fx graphs).
"""
