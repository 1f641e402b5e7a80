"""Opens files of torch.save without running code from them.

``recognize`` tells the format, ``scan`` follows a pickle without running it, ``permissions`` judges
what it would do, ``unpickle`` lets torch open it, ``soundness`` judges what came out. May import:
``excitations``, ``converted`` (for the classes of excited layers) and what lies below. To allow
another class or function, name it in ``permissions``.
"""
