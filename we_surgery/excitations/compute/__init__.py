"""How excitations are computed: in closed form, or stage by stage with a second run in backward.

Lives here: the ``formulas``; ``closed_form``, one weight as an autograd function, or all weights of
an attached step; the Triton kernels, and ``backends``, which chooses them; ``rerun`` for methods
without a closed form. May import: ``excitations``' base and formulas of single methods.
"""
