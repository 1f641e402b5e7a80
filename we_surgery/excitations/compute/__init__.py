"""How excitations are computed: the closed form, many layers together, and the Triton kernels.

May import: ``excitations``' formulas. To add a backend: ``backends.py``.
"""
