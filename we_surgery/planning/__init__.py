"""Facts about a model -> a plan: modes, policy, rules, config, the plan itself and its table.

May import: ``transplants``, ``reading``, ``excitations``, ``_util``. Touches no tensor. To add a
mode: one row in ``policy.MODES``. To add a key of a config: ``config.py``.
"""
