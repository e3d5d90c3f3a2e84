"""What mkdocs does for this site: the page of the command line is written from the commands' own parsers."""

import argparse
import re
from typing import Any

from timm_halonet.cli.main import make_parser

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts every command's help in place of the mark; links out of docs/ are shown as paths."""
    if MARK in markdown:
        markdown = markdown.replace(MARK, "\n\n".join(commands(make_parser(), "timm-halonet", 2)))
    return re.sub(r"\[([^\]]*)\]\((?:\.\./)+(hub_configs/[^)]*)\)", r"\1 (`\2` in the repository)", markdown)


def commands(parser: argparse.ArgumentParser, name: str, level: int) -> list[str]:
    """A section with the help of every command below `parser`."""
    sections = []
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        helps = {choice.dest: choice.help for choice in action._choices_actions}
        for command, sub in action.choices.items():
            title = f"{name} {command}"
            sections.append(f"{'#' * level} `{title}`\n\n{sentence(sub.description or helps.get(command) or '')}")
            below = commands(sub, title, level + 1)
            sections += below or [f"```text\n{help_text(sub)}```"]
    return sections


def help_text(parser: argparse.ArgumentParser) -> str:
    """What --help prints, in 90 columns, without colours and the description, which stands above it."""
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=90)
    parser.description = None
    parser.color = False  # Python 3.14
    return parser.format_help()


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return f"{text[:1].upper()}{text[1:].rstrip('.')}." if text else ""
