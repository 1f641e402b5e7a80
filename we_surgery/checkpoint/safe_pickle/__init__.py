"""Opens files of torch.save without running code from them.

``recognize`` tells the format, ``scan`` follows a pickle without running it, ``permissions`` checks
what it would do, ``unpickle`` lets torch open it, ``soundness`` checks the result. May import:
``excitations``, ``converted`` (for the classes of excited layers) and the rooms below. To allow
another class or function: ``permissions``.
"""
