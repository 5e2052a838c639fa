"""Open workflows in ComfyUI's page, and save and draw them as it does.

``python dev.py run assets/workflows.py demo/workflows/*.json`` writes the JSON files anew, runs the
demo's, and draws the thumbnails beside them. A Chromium is needed.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "hosting")]

from comfy_server import serving  # noqa: E402

from support.page import SCREENSHOTS, browsing  # noqa: E402
from support.workflow import DEMO, ONE_THREAD, place_files, read  # noqa: E402


def main() -> None:
    """Open, save, run and draw the workflows of the command line."""
    os.environ.update(ONE_THREAD)
    paths = [Path(argument).resolve() for argument in sys.argv[1:]]
    users = [read(path) for path in paths if path not in DEMO]
    with tempfile.TemporaryDirectory() as folder:
        base, log = Path(folder, "base"), Path(folder, "log")
        with serving(base, log, place_files(base, users)) as server, browsing(server) as page:
            for path in paths:
                page.open(read(path))
                text = json.dumps(page.saved(), indent=1, ensure_ascii=False)
                path.write_text(text + "\n", "utf-8")
                if path in DEMO:
                    page.wait_for(page.run(3600)["outputs"])  # some train
                picture = page.draw()
                SCREENSHOTS.mkdir(parents=True, exist_ok=True)
                picture.save(SCREENSHOTS / f"{path.stem}.png")
                picture.resize((800, 800 * picture.height // picture.width), Image.LANCZOS).save(
                    path.with_suffix(".jpg"), quality=85
                )
                print(path.stem, picture.size, page.marked(), page.errors)  # noqa: T201


if __name__ == "__main__":
    main()
