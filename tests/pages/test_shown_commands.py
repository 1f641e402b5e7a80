"""The commands that pages and help texts show have the options they are shown with."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

import we_surgery
from we_surgery import cli

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]

COMMANDS = {
    "we-surgery": cli.we_surgery,
    "we-convert": cli.convert_command,
    "we-strip": cli.strip_command,
    "we-inspect": cli.inspect_command,
}


def leaves(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for key, inner in command.commands.items():
            yield from leaves(inner, f"{name} {key}")
    else:
        yield name, command


ALL_COMMANDS = dict(leaves(cli.we_surgery, "we-surgery"))
TEXTS = {
    **{page.name: page.read_text() for page in PAGES},
    **{f"{name} --help": command.help or "" for name, command in ALL_COMMANDS.items()},
}


def shown_commands(text: str) -> Iterator[list[str]]:
    """The lines of a page or help text that call one of our commands."""
    lines = re.sub(r"torchrun .*-m we_surgery", "we-surgery", text.replace("\\\n", " "))
    for line in re.findall(r"^ *(?:\$ )?(we-(?:convert|strip|inspect|surgery) .*)$", lines, re.M):
        for part in line.split(";"):
            words = shlex.split(re.sub(r" +#.*| +> .*| +->.*", "", part).replace("`", ""))
            if words and words[0] in COMMANDS and "--help" not in words:
                yield words


@pytest.mark.parametrize("text", TEXTS)
def test_each_command_that_is_shown_has_the_options_it_is_shown_with(text: str) -> None:
    for words in shown_commands(TEXTS[text]):
        parse(words)


def parse(words: list[str]) -> None:
    command, name = COMMANDS[words[0]], words[0]
    arguments = words[1:]
    while isinstance(command, click.Group) and arguments:
        command, arguments = command.commands[arguments[0]], arguments[1:]
    if isinstance(command, click.Group):
        return  # named in a sentence without one of its commands
    with contextlib.suppress(click.exceptions.Exit):  # an option that prints and ends
        command.make_context(name, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_within_the_text_have_the_options_they_are_shown_with(page: Path) -> None:
    for text in re.findall(r"`(we-(?:convert|strip|inspect|surgery) [^`]+)`", page.read_text()):
        # A command in a sentence may leave off its file.
        with contextlib.suppress(click.MissingParameter):
            parse(shlex.split(text))


def test_the_reading_of_commands_finds_them() -> None:
    assert ["we-convert", "model.pt"] in list(shown_commands(TEXTS["README.md"]))


@pytest.mark.parametrize("name", ALL_COMMANDS)
def test_each_help_text_is_complete(name: str) -> None:
    command = ALL_COMMANDS[name]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
    assert "Example" in (command.help or "")
    assert name.replace("we-surgery ", "we-") in command.help or name in command.help
    with click.Context(command, info_name=name) as context:
        assert re.search(r"Exit codes: 0 \w+, (1 .+, )?2 ", command.get_help(context))


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.stem)
def test_links_of_the_pages_beside_the_readme_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_version_is_the_same_everywhere() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == we_surgery.__version__
    sections = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert sections[0] == we_surgery.__version__
