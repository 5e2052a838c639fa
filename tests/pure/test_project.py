"""What a newcomer reads: README, docs/, CONTRIBUTING and the changelog, and that their links lead
somewhere.
"""

import re
from pathlib import Path

import pytest

from support import ROOT

PAGES = [
    *sorted(path for path in ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("benchmarks/**/*.md")),
]
DOCS = {
    "models",
    "exactness",
    "speed",
    "alignment",
    "uvit",
    "lora",
    "words",
    "search",
    "evidence",
    "development",
}
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them, and of its marks."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page):
    """The links of a page that lead nowhere within the repository."""
    missing = []
    for target in LINK.findall(page.read_text("utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert broken(page) == []


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A b\n\n[x](gone.md) [y](#a-b) [z](#c) [w](https://example.org) ![v](p.png)")
    assert broken(page) == ["gone.md", "#c", "p.png"]


def test_readme_is_short_and_has_what_users_look_for():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.split()) <= 1200
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    wanted = [
        "Install",
        "Your first picture",
        "Words that weigh",
        "Which values",
        "Models",
        "Nodes",
        "The LoRA",
        "Does it help?",
        "Try it, test it",
        "FAQ",
        "Citation",
        "Licence",
    ]
    assert headings == wanted
    assert text.index("![") < text.index("## Install")
    for link in (
        "arxiv.org/abs/2506.07986",
        "vchitect.github.io/TACA",
        "github.com/Vchitect/TACA",
        "huggingface.co/ldiex/TACA",
        "git clone https://",
    ):
        assert link in text
    assert {path.stem for path in ROOT.glob("docs/*.md")} == DOCS
    linked = {Path(target).stem for page in PAGES[:20] for target in LINK.findall(page.read_text())}
    assert linked >= DOCS


def test_readme_names_every_node(pack):
    text = (ROOT / "README.md").read_text("utf-8")
    names = [node.GET_SCHEMA().display_name for node in pack.values()]
    missing = [name for name in names if name.replace("U-ViT", "").strip() not in text]
    assert missing == []


def test_the_code_map_has_every_module():
    """Each module of what ships, by name or with its folder; and nothing that is gone."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    table = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    modules = {path.name for path in (ROOT / "taca").glob("*.py")} - {"__init__.py"}
    named = set(re.findall(r"[a-z_]+\.py", table))
    assert named - {"__init__.py", "dev.py", "reference.py"} == modules
    for folder in (
        "nodes/",
        "nodes/ui/",
        "uvit/",
        "demo/",
        "demo/training/",
        "hosting/",
        "benchmarks/",
        "tests/",
    ):
        assert f"`{folder}`" in table


def test_the_changelog_dates_each_release():
    """All but the version under way have a date, and none is later than the one above it."""
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    version = re.search(r'^version = "(.+)"$', project, re.MULTILINE)[1]
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    heads = re.findall(r"^## (\S+) \((.+)\)$", text, flags=re.MULTILINE)
    assert len(heads) == len(re.findall(r"^## ", text, flags=re.MULTILINE))
    assert heads[0][0] == version
    dates = [date for _, date in heads if date != "unreleased"]
    assert [date for _, date in heads[1:]] == dates[-len(heads) + 1 :]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates)
    assert dates == sorted(dates, reverse=True)
