"""README.fr.md is README.md in French: the same commands, sections, names and places."""

import re

import pytest

from tests.helpers import ROOT

ENGLISH, FRENCH = ((ROOT / name).read_text() for name in ("README.md", "README.fr.md"))
BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[str]:
    """Code and output, without comments, which are translated."""
    return [re.sub(r" +# .*", "", block) for block in BLOCK.findall(text)]


@pytest.mark.parametrize("i", range(len(blocks(ENGLISH))))
def test_a_block_of_code_is_the_same_in_both_languages(i: int) -> None:
    assert blocks(FRENCH)[i] == blocks(ENGLISH)[i]


def test_both_languages_have_the_same_sections() -> None:
    levels = [[line.split()[0] for line in text.splitlines() if line.startswith("#")] for text in (ENGLISH, FRENCH)]
    assert levels[0] == levels[1]


def test_both_languages_name_the_same_things() -> None:
    names = [sorted(re.findall(r"`([^`]+)`", BLOCK.sub("", text))) for text in (ENGLISH, FRENCH)]
    assert names[0] == names[1]


def test_both_languages_link_to_the_same_places() -> None:
    links = [sorted(re.findall(r'\]\(([^)]+)\)|src(?:set)?="([^"]+)"', text)) for text in (ENGLISH, FRENCH)]
    others = [("README.fr.md", ""), ("README.md", "")]
    assert [each for each in links[0] if each not in others] == [each for each in links[1] if each not in others]


@pytest.mark.parametrize("link", re.findall(r'\]\(([^):]+)\)|src(?:set)?="([^"]+)"', ENGLISH))
def test_what_the_readme_links_to_is_there(link: tuple[str, str]) -> None:
    assert (ROOT / "".join(link)).exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z-]+)", ENGLISH + FRENCH))))
def test_make_knows_each_target_of_the_readme(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
