"""The command line: ``we-convert``, ``we-strip``, ``we-inspect``, and ``we-surgery`` over them.

Lives here: options and printing; what a command does is in ``jobs``. May import: every room, but
those that import torch only within functions, after the arguments were checked. To add a command:
one file, and one line below.
"""

import click

from we_surgery._util.version import __version__
from we_surgery.cli.analyse import analyse_group as analyse_group
from we_surgery.cli.convert import convert_command as convert_command
from we_surgery.cli.inspect import inspect_command as inspect_command
from we_surgery.cli.run import run_command as run_command
from we_surgery.cli.strip import strip_command as strip_command


@click.group(
    commands={
        "convert": convert_command,
        "strip": strip_command,
        "inspect": inspect_command,
        "run": run_command,
        "analyse": analyse_group,
    }
)
@click.version_option(__version__, package_name="we-surgery")
def we_surgery() -> None:
    """Put weight excitation into a model, and take it out again before deployment.

    \b
    Example:
      we-surgery convert model.pt        -> model.we.pt, ready to train
      we-surgery strip checkpoint.pt     -> checkpoint.stripped.pt, a vanilla model
    """
