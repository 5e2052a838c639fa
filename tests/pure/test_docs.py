"""Help pages and translations say what the nodes have: no more, no less, in both languages."""

import json
import os
import re

import pytest
from comfy_api.latest import io

from support import ROOT

LOCALES, DOCS = ROOT / "locales", ROOT / "web" / "docs"
LANGUAGES = ("en", "zh")
HEADINGS = {"en": ("## Inputs", "## Outputs"), "zh": ("## 输入", "## 输出")}
TRANSLATED = re.compile("[\u4e00-\u9fff]")
# Alike in both languages: TACA itself, gamma, and the names of ComfyUI's own kinds.
KEPT = {"TACA", "U-ViT", "gamma", "CLIP", "VAE", "LoRA"}

pytestmark = pytest.mark.skipif(
    not hasattr(io, "Curve"), reason="the help tells of a window that this ComfyUI cannot draw"
)


def inputs_of(schema):
    """Inputs by the names that the page has for them: a nested one is ``parent.child``."""
    found = {}

    def add(inputs, prefix):
        for given in inputs:
            name = prefix + given.id
            assert found.setdefault(name, given).tooltip == given.tooltip, (
                f"{name} has two tooltips: the page can show only one"
            )
            for option in getattr(given, "options", None) or []:
                add(getattr(option, "inputs", []), f"{name}.")

    add(schema.inputs, "")
    return found


def english_of(node):
    """What locales/en/nodeDefs.json must say of a node; the page writes ``.`` as ``_``."""
    schema, info = node.GET_SCHEMA(), node.GET_NODE_INFO_V1()
    outputs = {}
    for i, (name, kind) in enumerate(zip(info["output_name"], info["output"], strict=True)):
        # The page has its own word for an output that is called by its type.
        named = {} if name == kind else {"name": name}
        outputs[str(i)] = {**named, "tooltip": info["output_tooltips"][i]}
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {
            name.replace(".", "_"): {"name": name.split(".")[-1], "tooltip": given.tooltip}
            for name, given in inputs_of(schema).items()
        },
        "outputs": outputs,
    }


def read(path):
    return json.loads(path.read_text("utf-8"))


def leaves(value, path=()):
    """Paths and texts of a nested dictionary."""
    if not isinstance(value, dict):
        return {path: value}
    return {p: text for key, v in value.items() for p, text in leaves(v, (*path, key)).items()}


def named_in(page, language):
    """Name and translation of what the lists under the two headings of a help page explain."""
    found, under = ([], []), None
    for line in page.splitlines():
        if line.startswith("## "):
            under = HEADINGS[language].index(line) if line in HEADINGS[language] else None
        elif under is not None and (item := re.match(r"- ([^`]*)`([^`]+)`(: |：)\S", line)):
            found[under].append((item[2], item[1].strip()))
    return found


def page_of(name, language):
    return DOCS / (f"{name}.md" if language == "en" else f"{name}/{language}.md")


def all_pages():
    return sorted(DOCS.rglob("*.md"))


def test_english_is_the_nodes_own(pack):
    """To change it on purpose, delete nodeDefs.json and run this test."""
    path = LOCALES / "en/nodeDefs.json"
    expected = {name: english_of(node) for name, node in pack.items()}
    if not path.exists() and not os.environ.get("CI"):
        path.write_text(json.dumps(expected, indent=2, ensure_ascii=False) + "\n", "utf-8")
    assert read(path) == expected


@pytest.mark.parametrize("name", ["main", "nodeDefs"])
def test_translations_are_complete(name):
    """The same texts, none empty, each in Chinese unless it is a name."""
    english, chinese = (leaves(read(LOCALES / language / f"{name}.json")) for language in LANGUAGES)
    assert chinese.keys() == english.keys()
    for path, text in chinese.items():
        assert isinstance(english[path], str), f"{path}: there is no text in English"
        assert TRANSLATED.search(text) or text in KEPT, f"{path}: {text!r} is not Chinese"


def test_main_names_the_categories_and_the_types(pack):
    categories, types = set(), set()
    for node in pack.values():
        info = node.GET_NODE_INFO_V1()
        categories |= set(info["category"].split("/"))
        types |= {kind for kind in info["output"] if kind.startswith("TACA")}
    main = read(LOCALES / "en/main.json")
    assert main["nodeCategories"].keys() == categories
    assert main["dataTypes"].keys() == types


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_can_read_the_texts(language):
    """Its translator takes these signs for commands of its own."""
    for path in (LOCALES / language).glob("*.json"):
        for key, text in leaves(read(path)).items():
            assert not set("{}@|$") & set(text), f"{key}: {text}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_has_a_help_page(pack, language):
    texts = read(LOCALES / language / "nodeDefs.json")
    for name, node in pack.items():
        page = page_of(name, language).read_text("utf-8")
        assert page.startswith(f"# {texts[name]['display_name']}\n"), name
        inputs, outputs = named_in(page, language)
        explained = [socket for socket, _ in inputs]
        # Inputs of different windows may be called alike.
        assert set(explained) == {i.split(".")[-1] for i in inputs_of(node.GET_SCHEMA())}, name
        info = node.GET_NODE_INFO_V1()
        assert [socket for socket, _ in outputs] == info["output_name"], name
        if language != "en":
            words = {text["name"] for text in texts[name]["inputs"].values()}
            assert {word for _, word in inputs if word} == words - KEPT, name


def test_every_help_page_has_a_node(pack):
    assert set(all_pages()) == {page_of(name, one) for name in pack for one in LANGUAGES}


def test_pictures_of_the_help_pages():
    """Each is there, none is left over, and the page finds it from any page's folder."""
    shown = {
        target
        for page in all_pages()
        for target in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text("utf-8"))
    }
    there = {path.relative_to(DOCS).as_posix() for path in (DOCS / "images").iterdir()}
    assert shown == there
    assert sum((DOCS / name).stat().st_size for name in there) < 1_000_000


def test_a_missing_word_is_seen():
    """The checks above see what is missing."""
    page = "# A\n\n## Inputs\n\n- `one`: as `other`\n- word `two`\n\n## Outputs\n\n`x`\n"
    assert named_in(page, "en") == ([("one", "")], [])
    assert leaves({"a": {"b": "c"}}) != leaves({"a": {"b": "c", "d": "e"}})
    assert not TRANSLATED.search("text")
