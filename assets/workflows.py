"""Open workflows in ComfyUI's page, save them as it does, and draw what the page offers them by.

``python dev.py run assets/workflows.py demo/workflows/*.json`` writes the JSON files anew, with
where their nodes and models come from. One that says which widgets App Mode shows is saved a second
time as ``NAME.app.json``, which opens in App Mode. The thumbnails beside them are the pictures that
come out of the demo's, and for the others a card. A Chromium is needed.
"""

import io
import json
import math
import os
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "hosting"), str(ROOT / "assets")]

from comfy_server import Server, serving  # noqa: E402
from draw import NIGHT, card  # noqa: E402

from support.page import SCREENSHOTS, browsing  # noqa: E402
from support.workflow import (  # noqa: E402
    APP,
    DEMO,
    ONE_THREAD,
    app_form,
    nodes_of,
    place_files,
    read,
    source_of,
)

WIDTH = 512  # of a thumbnail; the page shows it at 400 or so


def main() -> None:
    """Open, save, run and draw the workflows of the command line."""
    os.environ.update(ONE_THREAD)
    paths = [Path(argument).resolve() for argument in sys.argv[1:] if APP not in argument]
    users = [read(path) for path in paths if path not in DEMO]
    with tempfile.TemporaryDirectory() as folder:
        base, log = Path(folder, "base"), Path(folder, "log")
        with serving(base, log, place_files(base, users)) as server, browsing(server) as page:
            info = server.get("/object_info")
            core = server.get("/system_stats")["system"]["comfyui_version"]
            for path in paths:
                page.open(read(path))
                workflow = page.saved()
                for node in nodes_of(workflow):
                    node["properties"] |= source_of(node, info[node["type"]], core)
                write(workflow, path)
                if path not in DEMO:
                    thumbnail = card(*heading_of(workflow))
                else:
                    outputs = page.run(3600)["outputs"]  # some train
                    page.wait_for(outputs)
                    titles = {str(node["id"]): node.get("title", "") for node in workflow["nodes"]}
                    thumbnail = sheet(server, outputs, titles)
                thumbnail.save(path.with_suffix(".jpg"), quality=88)
                if "linearData" in workflow["extra"]:
                    write(app_form(workflow), path.with_suffix(APP))
                    thumbnail.save(path.with_suffix(APP).with_suffix(".jpg"), quality=88)
                SCREENSHOTS.mkdir(parents=True, exist_ok=True)
                page.draw().save(SCREENSHOTS / f"{path.stem}.png")
                print(path.stem, page.marked(), page.errors)  # noqa: T201


def write(workflow: dict, path: Path) -> None:
    """Write a workflow as the page downloads one."""
    path.write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n", "utf-8")


def heading_of(workflow: dict) -> list[str]:
    """The model and what is done with it, from the note's first line."""
    [note] = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    return note["widgets_values"][0].splitlines()[0].removeprefix("# ").split(": ", 1)


def sheet(server: Server, outputs: dict, titles: dict[str, str]) -> Image.Image:
    """What a run put out, each picture once, in a square: a row for a node with several.

    A node's first picture has its title, if somebody gave it one.
    """
    rows, seen = [], set()
    for node in sorted(outputs, key=int):
        row = []
        for image in outputs[node].get("images", ()):
            picture = Image.open(io.BytesIO(server.picture(image))).convert("RGB")
            # The top of a long sheet, which would be too small to read.
            picture = picture.crop((0, 0, picture.width, min(picture.height, picture.width)))
            if picture.tobytes() not in seen and len(row) < 3:
                row.append((picture, "" if row else titles[node]))
            seen.add(picture.tobytes())
        rows += [row] if row else []
    columns = max(map(len, rows))
    if columns == 1:
        columns = math.ceil(math.sqrt(len(rows)))
        cells = [each for row in rows for each in row]
        rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    cell = WIDTH // columns
    whole = Image.new("RGB", (WIDTH, WIDTH), NIGHT)
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(20)
    top = (WIDTH - cell * len(rows)) // 2
    for i, row in enumerate(rows):
        for j, (picture, title) in enumerate(row):
            x, y = j * cell + 2, top + i * cell + 2
            whole.paste(ImageOps.pad(picture, (cell - 4, cell - 4), color=NIGHT), (x, y))
            draw.text((x + 6, y + 4), title, "white", font, stroke_width=3, stroke_fill=NIGHT)
    return whole


if __name__ == "__main__":
    main()
