"""Files in, files out, as the commands run them, and the HTML report.

May import: every room but ``cli``. To add a command's job: one file here and a command in ``cli``.
"""
