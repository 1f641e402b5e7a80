"""``python -m we_surgery``, the same as the ``we-surgery`` command."""

from we_surgery.cli import we_surgery

if __name__ == "__main__":
    we_surgery(prog_name="we-surgery")
